"""Copies of a shard on their way from one node to another: both sides of the transfer.

The source pins a snapshot and reads it in chunks; the receiver writes what it does not have yet,
then applies what the source's log says since. A chunk carries a checksum beside TLS's own, because
it is read from a disk. Nothing blocks the event loop for long: files are read, written and synced
in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from agentmem_cluster.errors import AgentMemError, Unavailable, WrongShard
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.runtime import Clock
from agentmem_node.service.routing import LocalShard
from agentmem_node.service.threads import to_its_end
from agentmem_node.storage.checkpoint import Checkpoint
from agentmem_node.storage.snapshot import CHUNK_BYTES, SnapshotWriter, StorageSnapshot, chunk_hash

# A snapshot that nobody reads from keeps pages of its shard from being reused: not for long.
_LEASE_S: Final = 30.0
_SNAPSHOTS_MAX: Final = 16
# Chunks asked for ahead: one being read, one on its way, one being written.
_AHEAD: Final = 4
_TAIL_BYTES_MAX: Final = 1 << 20
_CALL_S: Final = 20.0

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Paused(Unavailable):
    """The source has no such snapshot or log any more: the copy begins again."""

    code = "copy_paused"


@dataclass(slots=True)
class _Leased:
    snapshot: StorageSnapshot
    shard: str
    used_s: float


class Sources:
    """What this node gives to others: snapshots of its replicas, and their logs since."""

    def __init__(self, local: Callable[[str, int], LocalShard], clock: Clock) -> None:
        """`local(shard, epoch)`: the replica here, or WrongShard."""
        self._local = local
        self._clock = clock
        self._leased: dict[str, _Leased] = {}
        self._number = 0
        self._followed: dict[str, float] = {}  # shard -> when its log was last asked for

    async def on_open(self, peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`replica.open`: pin a snapshot of a replica, and keep its log from there on."""
        local = self._local(body["shard"], body["epoch"])
        self.expire()
        if len(self._leased) >= _SNAPSHOTS_MAX:
            raise Unavailable("This node gives too many copies already.")
        index = local.shard.applied_index
        snapshot = local.shard.open_snapshot()
        self._number += 1
        name = f"{peer}-{self._number}"
        now_s = self._clock.monotonic()
        self._leased[name] = _Leased(snapshot, local.info.id, now_s)
        self._follow(local, index)
        failpoint("copying.source_open")
        return {
            "snapshot": name,
            "bytes": snapshot.size_bytes,
            "metas": snapshot.checkpoint.metas,
            "state": snapshot.checkpoint.state,
            "index": index,
            "term": local.group.term_at(index),
        }

    async def on_chunk(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`replica.chunk`: one chunk, or that the receiver has it already."""
        leased = self._leased.get(body["snapshot"])
        if leased is None:
            raise Paused("That snapshot is no longer kept here.")
        leased.used_s = self._clock.monotonic()
        number, have = body["number"], body["have"]

        def read() -> dict[str, Any]:
            failpoint("copying.source_chunk")
            data = leased.snapshot.read(number)
            if have is not None and chunk_hash(data) == have:
                return {"same": True}
            return {"data": data, "crc": crc32(data)}

        return await asyncio.to_thread(read)

    async def on_release(self, _peer: str, body: dict[str, Any]) -> None:
        """`replica.release`: the copy is whole."""
        leased = self._leased.pop(body["snapshot"], None)
        if leased is not None:
            leased.snapshot.close()

    async def on_tail(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`replica.tail`: entries after an index that are applied here."""
        local = self._local(body["shard"], body["epoch"])
        after = body["after"]
        failpoint("copying.source_tail")
        try:
            entries = local.group.read_log(after, _TAIL_BYTES_MAX)
        except IndexError:
            raise Paused(f"Entries after {after} are compacted here.") from None
        self._follow(local, after)
        return {
            "entries": [list(entry) for entry in entries],
            "applied": local.group.status().applied_index,
        }

    def _follow(self, local: LocalShard, index: int) -> None:
        self._followed[local.info.id] = self._clock.monotonic()
        local.group.retain(index)

    def expire(self) -> None:
        """Let go of what nobody has asked for lately."""
        old_s = self._clock.monotonic() - _LEASE_S
        for name, leased in list(self._leased.items()):
            if leased.used_s < old_s or not leased.snapshot.is_open:
                leased.snapshot.close()
                del self._leased[name]
        for shard, used_s in list(self._followed.items()):
            if used_s < old_s:
                del self._followed[shard]
                try:
                    self._local(shard, -1).group.retain(None)
                except WrongShard:
                    pass  # the replica has left this node, and its log with it


class Pace:
    """Lets `bytes_per_s` through, evenly."""

    def __init__(self, bytes_per_s: int, clock: Clock) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_s = clock.monotonic()

    async def take(self, size_bytes: int) -> None:
        now_s = self._clock.monotonic()
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        if self._free_s - now_s > 0.005:
            await asyncio.sleep(self._free_s - now_s)


async def receive(
    ask: Ask,
    shard: str,
    epoch: int,
    folder: Path,
    pace: Pace,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Copy a snapshot into `folder`. Returns the index and term of its last entry.

    Raises what the source raises, Paused when it has to begin again, OSError of this disk. What
    was received stays for the next attempt.
    """
    opened = await ask("replica.open", {"shard": shard, "epoch": epoch})
    failpoint("copying.after_open")
    size_bytes = int(opened["bytes"])
    writer: SnapshotWriter | None = None
    try:
        writer = await to_its_end(SnapshotWriter, folder, size_bytes)
        async with _tasks() as start:
            numbers = iter(range(-(-size_bytes // CHUNK_BYTES)))
            flying: list[asyncio.Task[int]] = []
            done = 0
            while True:
                while len(flying) < _AHEAD and (number := next(numbers, None)) is not None:
                    flying.append(start(_fetch(ask, opened["snapshot"], number, writer, pace)))
                if not flying:
                    break
                done += await flying.pop(0)
                failpoint("copying.after_chunk")
                progress(min(done, size_bytes), size_bytes)
        failpoint("copying.before_finish")
        await to_its_end(writer.finish, Checkpoint(opened["metas"], opened["state"]))
    finally:
        if writer is not None:
            writer.close()
        with suppress(AgentMemError):  # the source lets go of it by itself, after a while
            await ask("replica.release", {"snapshot": opened["snapshot"]})
    return int(opened["index"]), int(opened["term"])


@asynccontextmanager
async def _tasks() -> AsyncIterator[Callable[[Coroutine[Any, Any, int]], asyncio.Task[int]]]:
    """All of them are over at the end: none writes to what is closed then."""
    started: list[asyncio.Task[int]] = []

    def start(work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        task = asyncio.create_task(work)
        started.append(task)
        return task

    try:
        yield start
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


async def _fetch(ask: Ask, snapshot: str, number: int, writer: SnapshotWriter, pace: Pace) -> int:
    have = await to_its_end(writer.hash_of, number)
    answer = await ask("replica.chunk", {"snapshot": snapshot, "number": number, "have": have})
    if answer.get("same"):
        return CHUNK_BYTES
    data = answer["data"]
    if crc32(data) != answer["crc"]:
        raise Paused(f"Chunk {number} was damaged on its way.")
    await pace.take(len(data))
    await to_its_end(writer.write, number, data)
    return CHUNK_BYTES


async def tail(ask: Ask, shard: str, epoch: int, after: int) -> tuple[list[Entry], int]:
    """Entries after `after`, and how far the source is. Raises Paused when they are compacted."""
    answer = await ask("replica.tail", {"shard": shard, "epoch": epoch, "after": after})
    return [Entry(*entry) for entry in answer["entries"]], int(answer["applied"])


def asker(
    call: Callable[..., Awaitable[Any]], source: str, here: dict[str, Callable[..., Any]] | None
) -> Ask:
    """How to ask a source: over the link, or, when it is this node, its own handlers."""

    async def ask(method: str, body: dict[str, Any]) -> Any:
        if here is not None:
            return await here[method](source, body)
        return await call(source, method, body, timeout=_CALL_S)

    return ask
