"""The replicas of this node while the cluster changes shape: opens them, and lets them go.

`agentmem_cluster.epochs.replicas` decides. Here its state machines are opened, what it decided is
carried out, and peers are answered; `copies.py` makes the copies, `leading.py` does what a shard's
leader has to, `folders.py` keeps the disk tidy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.commands import Seal, encode
from agentmem_cluster.epochs.machine import EpochAware
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet, Served
from agentmem_cluster.errors import BadRequest, DiskFull, StateDamaged, Unavailable
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import GroupStatus
from agentmem_cluster.raft.applying import LogBehind
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.runtime import Clock, Disk
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.engine.shard import Shard
from agentmem_node.service.copies import Copies, OpenShard, no_backups
from agentmem_node.service.copying import Sources
from agentmem_node.service.folders import Folders
from agentmem_node.service.leading import Leading
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.storage.checkpoint import DATA_NAME, RecordDamaged, StorageDamaged, damaged
from agentmem_node.storage.walk import find_broken

log = logging.getLogger("agentmem.replicas")

_IDLE_S: Final = 0.25
_BUSY_S: Final = 0.01
_CALL_S: Final = 2.0
# A replica that left may still answer requests that began before.
_LINGER_S: Final = 3.0


class Replicas:
    def __init__(
        self,
        node_id: str,
        folder: Path,
        disk: Disk,
        record: LocalRecord,
        *,
        host: Host,
        link: Link | None,
        routing: Routing,
        clock: Clock,
        open_shard: OpenShard,
        copy_bytes_per_s: int,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        """`open_shard(id, folder)`: with everything that a served shard has."""
        self._node_id = node_id
        self._host = host
        self._link = link
        self._routing = routing
        self._clock = clock
        self._open_shard = open_shard
        self._on_fatal = on_fatal
        self.set = ReplicaSet(
            node_id,
            disk,
            record,
            _Groups(host, self._leaving, lambda shard: shard in self.damaged),
            self,
            on_served=self._served,
            on_gone=self._gone,
            on_change=self.poke,
        )
        self.lost: dict[str, str] = {}  # shard -> why its replica here is of no use
        self.damaged: dict[str, str] = {}  # shard -> what of its replica is not what was written
        self._record = record
        self._disk = disk
        self._sources = Sources(self._whole, clock)
        self._wake = asyncio.Event()
        self._driving: asyncio.Task[None] | None = None
        self._broken: set[Path] = set()
        self._handlers: dict[str, Callable[..., Any]] = {
            "replica.open": self._sources.on_open,
            "replica.chunk": self._sources.on_chunk,
            "replica.release": self._sources.on_release,
            "replica.tail": self._sources.on_tail,
            "replica.report": self._on_report,
            "replica.stage": self._on_stage,
            "replica.checkpoint": self._on_checkpoint,
            "replica.seal": self._on_seal,
            "replica.close": self._on_close,
            "replica.suspect": self._on_suspect,
        }
        self.folders = Folders(folder, self.set, clock)
        self.copies = Copies(
            self.set,
            self.folders,
            link=link,
            routing=routing,
            clock=clock,
            here=self._handlers,
            open_shard=open_shard,
            bytes_per_s=copy_bytes_per_s,
            on_change=self.poke,
        )
        self._leading = Leading(
            self.set,
            link,
            routing,
            clock,
            view_wire=lambda: self.view_wire(),
            origin_of=self._origin_of,
        )
        # What the log of a shard says first that came out of a backup, of (source, epoch, digest,
        # time).
        self.origin_entry: Callable[[str, int, bytes, int], bytes] = no_backups
        self._rebased: dict[str, bytes] = {}  # with which digest a shard came out of a backup
        # How a peer's view of the cluster is taken over; set by the membership.
        self.learn_view: Callable[[Any], Any] = lambda wire: None
        self.view_wire: Callable[[], Any] = lambda: None
        # Who is to look at every row of a shard soon.
        self.on_suspect: Callable[[str], None] = lambda shard: None
        # Who wants to read the log of an epoch that has ended here, before it is dropped.
        self.on_leaving: Callable[[LocalShard], None] = lambda local: None

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        if self._link is not None:
            for method, handler in self._handlers.items():
                self._link.register(method, handler)
        self._reopen_copies()
        self.folders.tidy_up()
        self._driving = asyncio.create_task(self._drive(), name="replicas")
        self._driving.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A node that no longer settles its replicas must not go on as if it did."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_fatal(error)

    def _reopen_copies(self) -> None:
        for shard in list(self._record.ready):
            try:
                self.set.reopen(shard)
            except StorageDamaged as error:
                log.error("the copy of %s here is of no use: %s", shard, error)
                with self._record.kept(self._disk):
                    del self._record.ready[shard]

    async def stop(self) -> None:
        if self._driving is not None:
            self._driving.cancel()
            await asyncio.gather(self._driving, return_exceptions=True)
        await self._leading.stop()  # first: copies may wait for threads, and it would go on
        await self.copies.stop()

    def close(self) -> None:
        """Close every shard; the groups are stopped."""
        for local in self._routing.local.values():
            local.shard.close()
        self.copies.close()
        self.folders.close()

    def learn(self, shard_map: ShardMap, changes: dict[str, Change], revision: int = 0) -> None:
        """Take part in what can be taken part in now; what this disk refuses is tried again."""
        try:
            self._put_aside_what_fails(lambda: self.set.learn(shard_map, changes, revision))
        except (OSError, DiskFull) as error:
            # The view is adopted all the same: it says where everything else is.
            log.warning("cannot change what this node holds: %s; trying again", error)
        self.poke()

    def poke(self) -> None:
        """Something may be possible now that was not before."""
        self._wake.set()

    # -- States: where ReplicaSet gets its state machines from ------------------------------------

    async def find_broken(self) -> None:
        """Before anything is opened: which files nobody may look at, not even to say so."""
        self._broken = await find_broken(self.folders.known())

    def open(self, shard: str, folder: str) -> EpochAware:
        path = self.folders.path(folder)
        if path in self._broken:
            raise damaged(path / DATA_NAME, "it ends whoever reads it")
        return self._open_shard(shard, path)

    def release(self, shard: str, folder: str, state: EpochAware) -> None:
        assert isinstance(state, Shard)
        self.folders.let_go(folder, state, _LINGER_S)

    def rebase(self, state: EpochAware, index: int, ended: int) -> None:
        assert isinstance(state, Shard)
        self._rebased[state.id] = state.digest()
        state.rebase(index, ended)

    def _origin_of(self, info: ShardInfo, source: str) -> bytes:
        digest, now_ms = self._rebased.get(info.id, b""), self._clock.wall_ms()
        return self.origin_entry(source, info.epoch, digest, now_ms)

    def _served(self, served: Served, group: AsyncGroup) -> None:
        shard = served.machine.inner
        assert isinstance(shard, Shard)
        shard_id = served.info.id
        self.lost.pop(shard_id, None)
        self.damaged.pop(shard_id, None)
        shard.watch(partial(self.found_damaged, shard_id, shard))
        self._routing.serve(LocalShard(served.info, group, shard, served.machine))
        self.poke()

    def found_damaged(self, shard_id: str, shard: Shard, error: RecordDamaged) -> None:
        """A replica holds something else than was written. It goes on voting, and serves what is
        whole, until healing has made another of the other members' (`service/healing.py`)."""
        served = self.set.served.get(shard_id)
        if shard_id in self.damaged or served is None or served.machine.inner is not shard:
            return  # it is known, or another has taken its place
        log.error("%s", error)
        self.damaged[shard_id] = str(error)
        local = self._routing.local.get(shard_id)
        if local is not None:
            local.is_damaged = True
        self.poke()

    def _leaving(self, shard: str) -> None:
        local = self._routing.local.get(shard)
        if local is not None:
            self.on_leaving(local)

    def _gone(self, shard: str) -> None:
        self._routing.local.pop(shard, None)
        self.damaged.pop(shard, None)

    # -- what is to be done by itself ------------------------------------------------------------

    async def _drive(self) -> None:
        while True:
            try:
                # Not `wait_for`: Python 3.11's loses a cancellation that comes with the event.
                async with asyncio.timeout(_BUSY_S if self._is_busy() else _IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                self._step()
            except (OSError, DiskFull) as error:
                log.warning("cannot change what this node holds: %s; trying again", error)

    def _is_busy(self) -> bool:
        if any(not served.machine.has_begun for served in self.set.served.values()):
            return True
        return any(change.base is not None for change in self.set.changes.values())

    def _step(self) -> None:
        self.settle()
        now_s = self._clock.monotonic()
        self._leading.step(self.damaged)
        self.copies.step(now_s)
        self._sources.expire()
        self.folders.step(now_s)

    def settle(self) -> None:
        """Take part in what can be taken part in."""
        self._put_aside_what_fails(self.set.settle)

    def _put_aside_what_fails(self, settle: Callable[[], None]) -> None:
        """A replica that is of no use is put aside: the cluster gives this node another."""
        while True:
            try:
                settle()
                return
            except (LogBehind, StorageDamaged) as error:
                shard = self.set.settling
                if shard not in self._record.held:
                    raise
                if self._is_only_member(shard):
                    raise StorageDamaged(
                        f"The replica of shard {shard} here cannot be used: {error}",
                        hint=f"Node {self._node_id} has the only one. Restore the cluster from a "
                        "backup into an empty data directory (`agentmem backup restore`).",
                    ) from error
                log.error("the replica of %s here is of no use: %s", shard, error)
                self.lost[shard] = str(error)
                held = self._record.held[shard]
                with self._record.kept(self._disk):
                    self._record.close(shard, held.epoch)

    def _is_only_member(self, shard: str) -> bool:
        info = None if self.set.map is None else self.set.map.shards.get(shard)
        return info is not None and info.members == (self._node_id,)

    # -- what the conductor and other leaders ask ------------------------------------------------

    @property
    def handlers(self) -> dict[str, Callable[..., Any]]:
        """By method; for calls of this node to itself."""
        return self._handlers

    async def _on_report(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.set.report(Change.from_wire(body["change"])).to_wire()

    async def _on_checkpoint(self, _peer: str, body: dict[str, Any]) -> None:
        self._local(body["shard"], body["epoch"]).group.checkpoint_soon()

    async def _on_seal(self, _peer: str, body: dict[str, Any]) -> None:
        local = self._local(body["shard"], body["epoch"])
        if not local.machine.is_sealed:
            deadline = self._clock.monotonic() + _CALL_S
            failpoint("epoch.before_seal")
            await local.group.propose(encode(Seal(body["epoch"])), deadline=deadline)
            failpoint("epoch.after_seal")

    async def _on_stage(self, _peer: str, body: dict[str, Any]) -> None:
        """`replica.stage`: begin to copy, or go on with another source."""
        change = Change.from_wire(body["change"])
        # Or a view from before the change would say that nobody asks for the copy.
        await self.learn_view(body.get("view"))
        target = change.target_of(body["shard"])
        if target is None or self._node_id not in target.members:
            raise BadRequest(f"Node {self._node_id} is not to have {body['shard']}.")
        if not self._record.is_admitted:
            raise Unavailable(f"Node {self._node_id} has not been admitted yet.")
        self.copies.stage(change, target, body["source"])

    async def _on_close(self, _peer: str, body: dict[str, Any]) -> bool:
        """`replica.close`: the next epoch is founded; see that nobody reads the old one here."""
        await self.learn_view(body["view"])
        return self.set.close(body["shard"], body["epoch"])

    async def _on_suspect(self, peer: str, body: dict[str, Any]) -> None:
        """`replica.suspect`: a copy of this node's replica is damaged."""
        log.warning("what %s copied of %s is not what was written", peer, body["shard"])
        self.on_suspect(body["shard"])

    # -- inside ----------------------------------------------------------------------------------

    def _whole(self, shard: str, epoch: int) -> LocalShard:
        """The replica here, to be copied from. Raises WrongShard, StateDamaged."""
        if epoch != -1 and shard in self.damaged:
            raise StateDamaged(f"The replica of {shard} on {self._node_id} is damaged.")
        return self._local(shard, epoch)

    def _local(self, shard: str, epoch: int) -> LocalShard:
        """The replica here. Epoch -1: whichever it is. Raises WrongShard."""
        local = self._routing.local.get(shard)
        if local is not None and epoch == -1:
            return local
        return self._routing.check_epoch(shard, epoch)


class _Groups:
    """The host, as `ReplicaSet` sees it."""

    def __init__(
        self, host: Host, leaving: Callable[[str], None], is_damaged: Callable[[str], bool]
    ) -> None:
        self._host = host
        self._leaving = leaving
        self._is_damaged = is_damaged

    def add_group(self, spec: Any, machine: Any) -> AsyncGroup:
        return self._host.add_group(spec, machine)

    def remove_group(self, group_id: str) -> None:
        self._leaving(group_id)
        self._host.remove_group(group_id)

    def drop_log(self, group_id: str, epoch: int) -> None:
        self._host.drop_log(group_id, epoch)

    def checkpoint_soon(self, group_id: str) -> None:
        self._host.core.checkpoint_soon(group_id)
        self._host.wake()

    def status(self, group_id: str) -> GroupStatus:
        """A damaged replica is of no use for the next epoch: it is to be copied, and not from."""
        status = self._host.core.status(group_id)
        return replace(status, needs_reseed=True) if self._is_damaged(group_id) else status

    def term_at(self, group_id: str, index: int) -> int:
        return self._host.core.term_at(group_id, index)
