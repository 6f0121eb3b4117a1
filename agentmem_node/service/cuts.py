"""What a shard's leader does for a backup: stand still, hand out a snapshot, upload it.

`backup.cut` holds the shards that this node leads and pins a snapshot of each. When all nodes
have answered, there is a moment at which every shard of the cluster stands still: a write that
was acknowledged before it is in the snapshots, and one that was sent after such an acknowledgement
and came through is after it. `backup.release` lets writes go on, and then makes sure by a round
of the quorum that this node was still the leader at that moment: a leader that was replaced
without knowing holds up nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    Conflict,
    InternalError,
    NotFound,
    NotLeader,
    Unavailable,
)
from agentmem_cluster.runtime import Clock
from agentmem_node.backup import catalog
from agentmem_node.backup.manifest import ShardBackup
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.backup.upload import Progress, RateLimit, upload_shard
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.threads import unless_called_off
from agentmem_node.storage.checkpoint import RecordDamaged
from agentmem_node.storage.snapshot import StorageSnapshot

log = logging.getLogger("agentmem.backup")

# A snapshot that nobody asks for any more keeps pages of its shard from being used again.
_FORGOTTEN_S = 60.0
_LOOK_S = 5.0
# Shards of one node at a time: each sends several chunks at once.
_UPLOADS_MAX = 1
_POLL_S_MAX = 10.0

_packer = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class _Cut:
    local: LocalShard
    snapshot: StorageSnapshot
    term: int
    asked_s: float
    progress: Progress = field(default_factory=Progress)
    upload: asyncio.Task[ShardBackup] | None = None


class Cuts:
    """The snapshots of this node that backups in progress need."""

    def __init__(self, routing: Routing, clock: Clock, rate_bytes_per_s: int) -> None:
        self._routing = routing
        self._clock = clock
        self._rate = RateLimit(rate_bytes_per_s)
        self._slots = asyncio.Semaphore(_UPLOADS_MAX)
        self._cuts: dict[tuple[str, str], _Cut] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None
        self.calls: dict[str, Callable[[str, dict[str, Any]], Awaitable[Any]]] = {
            "backup.probe": self.on_probe,
            "backup.cut": self.on_cut,
            "backup.release": self.on_release,
            "backup.upload": self.on_upload,
            "backup.drop": self.on_drop,
        }

    def start(self) -> None:
        self._reaper = asyncio.create_task(self._reap(), name="backup-reaper")

    async def stop(self) -> None:
        """Before the shards are closed: no thread may read from them then."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        for key in list(self._cuts):
            self._drop(*key)
        await asyncio.gather(*self._closing, return_exceptions=True)

    # -- calls ----------------------------------------------------------------------------

    async def on_probe(self, _peer: str, body: dict[str, Any]) -> bool:
        """Whether this node sees an object that the asking node has just written.

        Raises what the store raises.
        """
        url, name = body["url"], body["name"]
        return await asyncio.to_thread(lambda: open_store(url).exists(name))

    async def on_cut(self, _peer: str, body: dict[str, Any]) -> dict[str, list[int]]:
        """Hold and pin shards: {"backup", "shards": [[id, epoch], ...], "lease_ms"}.

        Raises NotLeader, WrongShard, Conflict, DeadlineExceeded: then it holds none of them.
        """
        backup, lease_s = body["backup"], body["lease_ms"] / 1000
        outcomes = await asyncio.gather(
            *(self._cut(backup, shard, epoch, lease_s) for shard, epoch in body["shards"]),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                for shard, _ in body["shards"]:
                    self._drop(backup, shard)
                raise outcome
        return {
            shard: [self._cuts[backup, shard].term, self._cuts[backup, shard].snapshot.size_bytes]
            for shard, _ in body["shards"]
        }

    async def _cut(self, backup: str, shard: str, epoch: int, lease_s: float) -> None:
        local = self._routing.check_epoch(shard, epoch)
        if not local.group.is_leader:
            raise NotLeader(f"This node does not lead shard {shard}.", leader=local.group.leader)
        await local.hold.begin(backup, lease_s)
        try:
            if not local.machine.accepts:
                raise Unavailable(f"Shard {shard} is between two epochs.", hint="Try again.")
            term = local.group.status().term
            snapshot = local.shard.open_snapshot()
        except BaseException:
            local.hold.release(backup)
            raise
        self._cuts[backup, shard] = _Cut(local, snapshot, term, self._clock.monotonic())

    async def on_release(self, _peer: str, body: dict[str, Any]) -> None:
        """Let writes go on. Raises Conflict when the cut is not consistent: it must be retried."""
        backup, shards = body["backup"], body["shards"]
        # All at once, and before anything is waited for: writers wait.
        held = [s for s in shards if self._find(backup, s).local.hold.release(backup)]
        if held != shards:
            raise Conflict("Writes were held up too long, and went on before all shards stood.")
        deadline = self._clock.monotonic() + body["left_ms"] / 1000
        for shard in shards:
            cut = self._find(backup, shard)
            group = cut.local.group
            await group.read_index(deadline=deadline)
            if not group.is_leader or group.status().term != cut.term:
                raise Conflict(f"Shard {shard} got another leader while the backup was begun.")
            if not cut.local.machine.accepts:
                raise Conflict(f"Shard {shard} began to move while the backup was begun.")

    async def on_upload(self, _peer: str, body: dict[str, Any]) -> list[Any]:
        """Upload a shard; asked again and again until it is done.

        {"backup", "shard", "url", "parent", "full", "wait_ms"} ->
        [done bytes, total bytes, uploaded bytes, phase, packed ShardBackup or None]
        """
        cut = self._find(body["backup"], body["shard"])
        cut.asked_s = self._clock.monotonic()
        if cut.upload is None:
            work = self._upload(cut, body["shard"], body["url"], body["parent"], body["full"])
            cut.upload = asyncio.create_task(work, name=f"backup-{body['shard']}")
        wait_s = min(body["wait_ms"] / 1000, _POLL_S_MAX)
        await asyncio.wait({cut.upload}, timeout=wait_s)
        cut.asked_s = self._clock.monotonic()
        progress = cut.progress
        made = None
        if cut.upload.done():
            made = _packer.encode(cut.upload.result())
        return [
            progress.done_bytes,
            progress.total_bytes,
            progress.moved_bytes,
            progress.phase,
            made,
        ]

    async def on_drop(self, _peer: str, body: dict[str, Any]) -> None:
        """The backup is done, or given up."""
        for key in [key for key in self._cuts if key[0] == body["backup"]]:
            self._drop(*key)

    # -- within ---------------------------------------------------------------------------

    def _find(self, backup: str, shard: str) -> _Cut:
        cut = self._cuts.get((backup, shard))
        if cut is None:
            raise NotFound(
                f"This node has no snapshot of shard {shard} for backup {backup}: it was started "
                "again since, or was not asked for a minute.",
                hint="Begin the backup anew.",
            )
        return cut

    async def _upload(
        self, cut: _Cut, shard: str, url: str, parent: str | None, full: bool
    ) -> ShardBackup:
        async with self._slots:
            epoch = cut.local.info.epoch
            databases = cut.local.shard.databases

            def work() -> ShardBackup:
                store = open_store(url)
                return upload_shard(
                    store,
                    cut.snapshot,
                    databases,
                    shard=shard,
                    epoch=epoch,
                    term=cut.term,
                    known=frozenset() if full else _known(store, parent, shard),
                    replace=full,
                    progress=cut.progress,
                    rate=self._rate,
                )

            def call_off() -> None:
                cut.progress.is_cancelled = True

            try:
                return await unless_called_off(call_off, work)  # its thread reads the snapshot
            except RecordDamaged as error:
                cut.local.shard.tell_damaged(error)
                raise
            except OSError as error:
                raise InternalError(f"Shard {shard} could not be read: {error}.") from error

    def _drop(self, backup: str, shard: str) -> None:
        cut = self._cuts.pop((backup, shard), None)
        if cut is None:
            return
        cut.local.hold.release(backup)
        cut.progress.is_cancelled = True
        closing = asyncio.ensure_future(_close(cut))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            late_s = self._clock.monotonic() - _FORGOTTEN_S
            for (backup, shard), cut in list(self._cuts.items()):
                if cut.asked_s < late_s:
                    log.warning("backup %s of %s is asked for by nobody: given up", backup, shard)
                    self._drop(backup, shard)


async def _close(cut: _Cut) -> None:
    if cut.upload is not None:
        cut.upload.cancel()
        await asyncio.gather(cut.upload, return_exceptions=True)
    cut.snapshot.close()


def _known(store: ObjectStore, parent: str | None, shard: str) -> frozenset[bytes]:
    """Chunks that the backup before has of this shard. A guess that saves asking for each."""
    if parent is None:
        return frozenset()
    try:
        return frozenset(catalog.load(store, parent).shard(shard).hashes)
    except (AgentMemError, KeyError):
        return frozenset()
