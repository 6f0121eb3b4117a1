"""Files of a node that are damaged while it is down: bits that flipped, ends that are missing.

Expected: the node refuses to start, in words that name the file, or it recovers. A node that
refused gets its file back, as an operator restores it; the others have the data all the while.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random
from typing import ClassVar

from agentmem_chaos.checkers.base import Damage
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.base import Field, Nemesis
from agentmem_chaos.runs.ready import NOT_WHOLE, wait_ready

ANSWER_S_MAX = 30.0
RECOVER_S_MAX = 40.0
_TRIES = 10_000


def has_content(path: Path) -> bool:
    """Whether anything was written into it: a preallocated file is zeros."""
    return len(path.read_bytes().rstrip(b"\0")) > 1


def flip_bits(path: Path, chance: Random, count: int) -> str:
    """Flip bits of bytes that are not zero: preallocated room is no data. Says what it did."""
    data = bytearray(path.read_bytes())
    if not any(data):
        raise ChaosError(f"{path} holds nothing that could be damaged.")
    flipped: list[int] = []
    for _ in range(_TRIES):
        offset = chance.randrange(len(data))
        if data[offset] and offset not in flipped:
            data[offset] ^= 1 << chance.randrange(8)
            flipped.append(offset)
        if len(flipped) == count:
            break
    path.write_bytes(data)
    shown = ", ".join(map(str, sorted(flipped)[:4])) + (", ..." if len(flipped) > 4 else "")
    return f"{len(flipped)} bits flipped at {shown}"


def truncate(path: Path, chance: Random) -> str:
    """Cut somewhere within what was written. Says what it did."""
    written = len(path.read_bytes().rstrip(b"\0"))
    if written < 2:
        raise ChaosError(f"{path} holds nothing that could be cut.")
    size = chance.randrange(1, written)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"cut at {size:,} of {written:,} bytes"


class _DamageNode(Nemesis):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS, Need.DATA})
    wants_whole_cluster: ClassVar[bool] = True
    may_end_nodes: ClassVar[bool] = True
    hold_s: ClassVar[tuple[float, float]] = (1.0, 2.0)
    # Patterns below the data directory; one of the files that match is damaged.
    patterns: ClassVar[tuple[str, ...]] = ()
    truncates: ClassVar[bool] = False
    flips: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self._file: Path | None = None
        self._backup: Path | None = None

    async def strike(self, field: Field) -> str:
        hosts = field.hosts
        node = field.a_node()
        self.victims = frozenset({node})
        await hosts.kill(node)
        data = hosts.data_dir(node)
        found = sorted(
            path
            for pattern in self.patterns
            for path in data.glob(pattern)
            if path.is_file() and has_content(path)
        )
        if not found:
            return f"{node} has no such file yet: killed and restarted only"
        self._file = field.chance.choice(found)
        # Outside of the data directory: the node must not find it.
        self._backup = data.parent.parent / f"{self._file.name}.before"
        shutil.copyfile(self._file, self._backup)
        if self.truncates:
            how = truncate(self._file, field.chance)
        else:
            how = flip_bits(self._file, field.chance, self.flips)
        name = str(self._file.relative_to(data))
        seen = len(hosts.log(node))
        began = time.monotonic()
        await hosts.start(node)
        outcome = await self._outcome(field, node, began)
        said = hosts.log(node)[seen:]
        self.damage = Damage(node, name, how, outcome, hosts.exit_code(node), said)
        return f"{name} of {node}: {how}; it {outcome}"

    async def _outcome(self, field: Field, node: str, began: float) -> str:
        try:
            await wait_ready(field.hosts, (node,), ANSWER_S_MAX)
        except ChaosError:
            if field.hosts.is_running(node) and time.monotonic() - began >= ANSWER_S_MAX:
                return "hung"
            return "refused"
        return "recovered"

    async def undo(self, field: Field) -> None:
        for node in self.victims:
            if self.damage is not None and self.damage.outcome == "hung":
                await field.hosts.kill(node)
            if not field.hosts.is_running(node):
                if self._backup is not None and self._file is not None:
                    self._file.parent.mkdir(exist_ok=True)  # it may have been put aside
                    shutil.copyfile(self._backup, self._file)
                await field.hosts.start(node)
            # What it lost it must have again before another node is struck.
            await wait_ready(field.hosts, field.nodes, RECOVER_S_MAX, but_for=NOT_WHOLE)
        if self._backup is not None:
            self._backup.unlink(missing_ok=True)


class FlipJournal(_DamageNode):
    name: ClassVar[str] = "flip-journal"
    description: ClassVar[str] = "a bit of a stopped node's journal flips"
    patterns: ClassVar[tuple[str, ...]] = ("journal/*.seg",)


class TruncateJournal(_DamageNode):
    name: ClassVar[str] = "truncate-journal"
    description: ClassVar[str] = "a stopped node's journal loses its end"
    patterns: ClassVar[tuple[str, ...]] = ("journal/*.seg",)
    truncates: ClassVar[bool] = True


class FlipLmdb(_DamageNode):
    name: ClassVar[str] = "flip-lmdb"
    description: ClassVar[str] = "bits of a stopped node's LMDB file flip"
    # It takes a moment until every row was looked at.
    hold_s: ClassVar[tuple[float, float]] = (3.0, 4.0)
    patterns: ClassVar[tuple[str, ...]] = ("shards/*/data.mdb",)
    flips: ClassVar[int] = 16


class TruncateLmdb(_DamageNode):
    name: ClassVar[str] = "truncate-lmdb"
    description: ClassVar[str] = "a stopped node's LMDB file loses its end"
    patterns: ClassVar[tuple[str, ...]] = ("shards/*/data.mdb",)
    truncates: ClassVar[bool] = True


class FlipIndex(_DamageNode):
    name: ClassVar[str] = "flip-index"
    description: ClassVar[str] = "bits of a stopped node's full-text index flip"
    patterns: ClassVar[tuple[str, ...]] = ("text/*",)
    flips: ClassVar[int] = 8


class TruncateIndex(_DamageNode):
    name: ClassVar[str] = "truncate-index"
    description: ClassVar[str] = "a file of a stopped node's full-text index loses its end"
    patterns: ClassVar[tuple[str, ...]] = ("text/*",)
    truncates: ClassVar[bool] = True


class FlipSnapshot(_DamageNode):
    name: ClassVar[str] = "flip-snapshot"
    description: ClassVar[str] = "a bit of a stopped node's checkpoint of a shard or of meta flips"
    patterns: ClassVar[tuple[str, ...]] = ("shards/*/checkpoint", "meta/state")


class TruncateSnapshot(_DamageNode):
    name: ClassVar[str] = "truncate-snapshot"
    description: ClassVar[str] = "a stopped node's checkpoint of a shard or of meta loses its end"
    patterns: ClassVar[tuple[str, ...]] = ("shards/*/checkpoint", "meta/state")
    truncates: ClassVar[bool] = True


DAMAGES: tuple[type[Nemesis], ...] = (
    FlipJournal,
    TruncateJournal,
    FlipLmdb,
    TruncateLmdb,
    FlipIndex,
    TruncateIndex,
    FlipSnapshot,
    TruncateSnapshot,
)
