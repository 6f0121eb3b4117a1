"""What a node knows of its own replicas, on its own disk: the file without which it must not vote.

A member that forgot what it promised could help a group to lose what was acknowledged. So this
file is written, and synced, *before* a replica takes part in an epoch or leaves one:

- `incarnation` names this disk. The meta group remembers it; a node that comes with another one
  has lost its disk, and takes no part in any epoch in which its old self may have voted.
- `held`: the epoch of each shard in which this node takes part.
- `closed`: the last epoch of each shard in which it never will (again).
- `ready`: whole copies that wait for their epoch to be founded. The meta group founds it because
  they are on disk, so a restart must find them again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from zlib import crc32

import msgpack

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardInfo

FORMAT: Final = 1
FILE_NAME: Final = "replicas"
_HEAD: Final = struct.Struct("<4sIQI")  # magic, format, bytes, checksum
_MAGIC: Final = b"AMRR"


class RecordCorrupt(AgentMemError):
    """The record of a node's replicas cannot be read. The node must not start."""

    code = "record_corrupt"


@dataclass(frozen=True, slots=True)
class Held:
    """A replica that takes part in an epoch. `folder`: its state, below the shards' folder."""

    epoch: int
    folder: str
    base_index: int = 0
    base_term: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """A copy with the final state, at entry `index` of term `term`, of the epoch before `info`'s.

    `revision`: of the view that asked for it; an older one cannot say that nobody does.
    """

    info: ShardInfo
    change_id: str
    folder: str
    index: int
    term: int
    revision: int

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Ready:
        info = wire["info"]
        return cls(**{**wire, "info": ShardInfo(**{**info, "members": tuple(info["members"])})})


@dataclass(slots=True)
class LocalRecord:
    incarnation: str
    is_admitted: bool = False  # the cluster has been told of this incarnation
    held: dict[str, Held] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)

    def may_take_part(self, group: str, epoch: int) -> bool:
        return self.is_admitted and epoch > self.closed.get(group, 0)

    def hold(self, group: str, held: Held) -> None:
        """Take part in an epoch; every earlier one is closed by that. Raises ValueError."""
        before = self.held.get(group)
        if not self.may_take_part(group, held.epoch) or (before and before.epoch > held.epoch):
            raise ValueError(f"epoch {held.epoch} of {group} is closed on this node")
        self.closed[group] = max(self.closed.get(group, 0), held.epoch - 1)
        self.held[group] = held
        self._forget_ready(group, held.epoch)

    def found(self, group: str, held: Held) -> None:
        """Take part in the first epoch of the group that will know this disk, before it can; again,
        if what came after it failed. Raises ValueError."""
        if self.held.get(group, held) != held or self.closed.get(group, 0) >= held.epoch:
            raise ValueError(f"this node holds {group}, or has closed epochs of it")
        self.held[group] = held

    def close(self, group: str, epoch: int) -> Held | None:
        """Never take part in `epoch` or an earlier one again. Returns what was held, if it ends."""
        self.closed[group] = max(self.closed.get(group, 0), epoch)
        self._forget_ready(group, epoch)
        held = self.held.get(group)
        if held is None or held.epoch > epoch:
            return None
        return self.held.pop(group)

    def _forget_ready(self, group: str, epoch: int) -> None:
        ready = self.ready.get(group)
        if ready is not None and ready.info.epoch <= epoch:
            del self.ready[group]

    # -- on disk -------------------------------------------------------------------------------

    @contextmanager
    def kept(self, disk: Disk) -> Iterator[None]:
        """What is changed within is on disk afterwards, or is as it was. Raises OSError.

        What only memory says is what a crash makes this node forget: nobody may act on it.
        """
        before = self.is_admitted, dict(self.held), dict(self.closed), dict(self.ready)
        try:
            yield
            self.save(disk)
        except BaseException:
            self.is_admitted, self.held, self.closed, self.ready = before
            raise

    def save(self, disk: Disk) -> None:
        """Replace the file, durably. Raises OSError; the old one then stands."""
        body: bytes = msgpack.packb(
            {
                "incarnation": self.incarnation,
                "is_admitted": self.is_admitted,
                "held": {group: asdict(held) for group, held in sorted(self.held.items())},
                "closed": dict(sorted(self.closed.items())),
                "ready": {group: ready.to_wire() for group, ready in sorted(self.ready.items())},
            }
        )
        failpoint("record.before_write")
        file = disk.open(f"{FILE_NAME}.new", create=True)
        try:
            file.truncate(0)
            file.pwrite(_HEAD.pack(_MAGIC, FORMAT, len(body), crc32(body)) + body, 0)
            file.datasync()
        finally:
            file.close()
        failpoint("record.after_write")
        disk.rename(f"{FILE_NAME}.new", FILE_NAME)
        failpoint("record.after_rename")
        disk.sync_dir("")

    @classmethod
    def load(cls, disk: Disk) -> LocalRecord | None:
        """None when there is no file. Raises RecordCorrupt."""
        if not disk.exists(FILE_NAME):
            return None
        file = disk.open(FILE_NAME)
        try:
            data = file.pread(file.size(), 0)
        finally:
            file.close()
        try:
            return cls._read(data)
        except (ValueError, KeyError, TypeError, struct.error, msgpack.UnpackException) as wrong:
            raise RecordCorrupt(
                f"The record of this node's replicas, {FILE_NAME}, is damaged: {wrong}.",
                hint="Without it nobody knows in which epochs this node has voted. Stop it, empty "
                "its data directory and start it again: the cluster re-seeds it by itself.",
            ) from wrong

    @classmethod
    def _read(cls, data: bytes) -> LocalRecord:
        magic, form, size, checksum = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        if magic != _MAGIC or len(body) != size or crc32(body) != checksum:
            raise ValueError("its checksum is wrong")
        if form != FORMAT:
            raise ValueError(f"it is of format {form}, and this program reads {FORMAT}")
        kept: Any = msgpack.unpackb(body)
        return cls(
            str(kept["incarnation"]),
            bool(kept["is_admitted"]),
            {str(group): Held(**held) for group, held in kept["held"].items()},
            {str(group): int(epoch) for group, epoch in kept["closed"].items()},
            {str(group): Ready.from_wire(row) for group, row in kept.get("ready", {}).items()},
        )
