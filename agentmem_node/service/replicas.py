"""The replicas of this node while the cluster changes shape: copies them, opens them, lets them go.

`agentmem_cluster.epochs.replicas` decides; this file opens folders, moves bytes and talks to peers.
A node that the map gives a replica which it does not have copies it by itself: nobody has to ask.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.commands import Begin, Seal, encode
from agentmem_cluster.epochs.fence import is_fenced
from agentmem_cluster.epochs.machine import EpochAware, EpochMachine
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet, Served, Staged
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    DeadlineExceeded,
    DiskFull,
    InternalError,
    NotLeader,
    ShuttingDown,
    StateDamaged,
    Unavailable,
)
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import GROUP_META, GroupStatus
from agentmem_cluster.raft.applying import LogBehind
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.runtime import Clock, Disk
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.engine.shard import Shard
from agentmem_node.service.copying import Pace, Paused, Sources, asker, receive, tail
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.threads import unless_called_off, until_over
from agentmem_node.storage.checkpoint import (
    DATA_NAME,
    RecordDamaged,
    StorageDamaged,
    damaged,
)
from agentmem_node.storage.snapshot import discard, partial_folder
from agentmem_node.storage.walk import find_broken

log = logging.getLogger("agentmem.replicas")

_IDLE_S: Final = 0.25
_BUSY_S: Final = 0.01
_TAIL_POLL_S: Final = 0.01
_RETRY_S: Final = 1.0
_DURABLE_EVERY_S: Final = 1.0
_CALL_S: Final = 2.0
# A replica that left may still answer requests that began before.
_LINGER_S: Final = 3.0
_SWEEP_S: Final = 60.0

OpenShard = Callable[[str, Path], Shard]
Fetch = Callable[[str, str, Path, Callable[[int, int], None]], None]


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
        self._folder = folder
        self._host = host
        self._link = link
        self._routing = routing
        self._clock = clock
        self._open_shard = open_shard
        self._copy_bytes_per_s = copy_bytes_per_s
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
        self._tasks: list[asyncio.Task[None]] = []
        self._copies: dict[str, asyncio.Task[None]] = {}
        # One part of a split at a time is received here: two together would hold up requests.
        self._parting = asyncio.Lock()
        self._syncs: dict[str, asyncio.Task[None]] = {}  # of copies, by folder
        self._begins: dict[str, asyncio.Task[None]] = {}
        self._broken: set[Path] = set()
        self._resigning: dict[str, asyncio.Task[None]] = {}
        self._retry_s: dict[str, float] = {}
        self._lingering: list[tuple[float, Shard, Path | None]] = []
        self._sweep_s = clock.monotonic() + _SWEEP_S
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
        # How a shard is fetched out of a backup (source, shard, folder, progress); blocks.
        self.fetch: Fetch = _no_backups
        # What the log of such a shard says first (source, epoch, digest, time).
        self.origin_entry: Callable[[str, int, bytes, int], bytes] = _no_backups
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
        self._tidy_up()
        driving = asyncio.create_task(self._drive(), name="replicas")
        driving.add_done_callback(self._ended)
        self._tasks.append(driving)

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
        tasks = [*self._tasks, *self._copies.values(), *self._begins.values()]
        tasks += self._resigning.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Close every shard; the groups are stopped."""
        for local in self._routing.local.values():
            local.shard.close()
        for staged in self.set.staged.values():
            if staged.machine is not None:
                staged.machine.close()
        for _, shard, _ in self._lingering:
            shard.abandon()

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
        self._broken = await find_broken([self._folder / name for name in self._known_folders()])

    def _known_folders(self) -> list[str]:
        held = [one.folder for shard, one in self._record.held.items() if shard != GROUP_META]
        return sorted({*held, *(ready.folder for ready in self._record.ready.values())})

    def open(self, shard: str, folder: str) -> EpochAware:
        if self._folder / folder in self._broken:
            raise damaged(self._folder / folder / DATA_NAME, "it ends whoever reads it")
        return self._open_shard(shard, self._folder / folder)

    def release(self, shard: str, folder: str, state: EpochAware) -> None:
        assert isinstance(state, Shard)
        until_s = self._clock.monotonic() + _LINGER_S
        self._lingering.append((until_s, state, self._folder / folder))

    def rebase(self, state: EpochAware, index: int, ended: int) -> None:
        assert isinstance(state, Shard)
        self._rebased[state.id] = state.digest()
        state.rebase(index, ended)

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
        for shard, served in self.set.served.items():
            local = self._routing.local.get(shard)
            if local is None or served.machine.has_begun or not local.group.is_leader:
                continue
            if shard not in self._begins:
                task = asyncio.create_task(self._begin(local, served), name=f"begin-{shard}")
                self._begins[shard] = task
                task.add_done_callback(partial(self._begin_ended, shard))
        for shard in self.damaged:
            local = self._routing.local.get(shard)
            if local is None or not local.group.is_leader or shard in self._resigning:
                continue
            task = asyncio.create_task(self._resign(local), name=f"resign-{shard}")
            self._resigning[shard] = task
            task.add_done_callback(partial(self._resigned, shard))
        for info in self.set.wanted():
            if now_s >= self._retry_s.get(info.id, 0.0):
                self._retry_s[info.id] = now_s + _RETRY_S
                running = self._copies.get(info.id)
                if running is not None:
                    running.cancel()  # it follows an epoch that is over; what it began may end
                    continue
                source = self._serving_member(info)
                if source is not None:
                    failed = self.set.staged.get(info.id)
                    if failed is not None and failed.machine is not None:
                        self._put_aside(failed, self._folder / failed.folder)
                    self._start_copy(self.set.begin_copy(info, "", info.epoch), info.id, source)
        for staged, change in self.set.restored_again():
            is_due = now_s >= self._retry_s.get(staged.info.id, 0.0)
            if is_due and staged.info.id not in self._copies:
                self._retry_s[staged.info.id] = now_s + _RETRY_S
                self._start(staged, self._restore(staged, change))
        for staged in self.set.staged.values():
            machine = staged.machine
            if (
                staged.state is Staging.COMPLETE
                and machine is not None
                and machine.durable_index < machine.inner.applied_index  # rebased after a start
                and staged.info.id not in self._copies
            ):
                self._start(staged, self._make_usable(staged))
        if self.set.map is not None:
            for staged in self.set.drop_copies(list(self.set.staged.values())):
                self._drop(staged)
        self._sources.expire()
        self._close_lingering(now_s)
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + _SWEEP_S
            self._sweep()

    async def _resign(self, local: LocalShard) -> None:
        """Give a leadership to a member whose replica is whole: what this one cannot read, nobody
        could write. Without any it goes on, with what is whole."""
        shard = local.info.id
        for member in local.info.members:
            if member == self._node_id or self._link is None:
                continue
            try:
                await self._link.call(member, "shard.may_lead", {"shard": shard}, timeout=_CALL_S)
                deadline = self._clock.monotonic() + _CALL_S
                await local.group.transfer(member, deadline=deadline)
                return
            except AgentMemError as error:
                log.debug("%s does not take the leadership of %s: %s", member, shard, error)
        await asyncio.sleep(_RETRY_S)

    def _resigned(self, shard: str, _: asyncio.Task[None]) -> None:
        self._resigning.pop(shard, None)

    def _begin_ended(self, shard: str, _: asyncio.Task[None]) -> None:
        self._begins.pop(shard, None)

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

    def _serving_member(self, info: ShardInfo) -> str | None:
        leader = self._routing.leader_of(info.id)
        members = sorted(info.members, key=lambda m: m == leader)
        for member in members:
            if member != self._node_id and self._routing.is_connected(member):
                return member
        return None

    def _close_lingering(self, now_s: float) -> None:
        rest = []
        for until_s, shard, folder in self._lingering:
            if until_s > now_s:
                rest.append((until_s, shard, folder))
                continue
            shard.abandon()
            if folder is not None and folder.name not in self.set.folders_in_use():
                self._discard(folder)
        self._lingering = rest

    def _discard(self, folder: Path) -> None:
        try:
            discard(folder)
        except OSError as error:
            log.warning("cannot remove %s: %s", folder, error)

    def _remove_fetched(self, folder: Path) -> None:
        """What was fetched out of a backup so far, for a copy that is not wanted any more."""
        for path in sorted(folder.parent.glob(f"{folder.name}.fetch*")):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            self._discard(path)
        else:
            with suppress(OSError):
                path.unlink()

    def _tidy_up(self) -> None:
        """Folders that a crash left behind: copies are kept to go on with, all else is removed."""
        if not self._folder.is_dir():
            return
        in_use = self.set.folders_in_use()
        for folder in sorted(self._folder.iterdir()):
            name = folder.name.removesuffix(".partial")
            if name in in_use or folder.name.endswith(".partial") or ".fetch" in name:
                continue  # what was being fetched out of a backup says itself whose it is
            if folder.name.endswith((".gone", ".new")) or partial_folder(folder).exists():
                self._discard(folder)
            elif folder.is_dir():
                folder.rename(partial_folder(folder))

    def _sweep(self) -> None:
        """What was copied for an epoch that is here, or over, and is nobody's: a copy that was
        given up, a replica that was put aside. Only a later epoch's may still be gone on with."""
        shard_map = self.set.map
        if shard_map is None or not self._folder.is_dir():
            return
        kept = self.set.folders_in_use()
        kept |= {ready.folder for ready in self._record.ready.values()}
        kept |= {folder.name for _, _, folder in self._lingering if folder is not None}
        for path in sorted(self._folder.iterdir()):
            name = path.name.partition(".")[0]  # of a part of it, or of what is fetched for it
            shard, _, epoch = name.rpartition("-e")
            info = shard_map.shards.get(shard)
            if name in kept or info is None or not epoch.isdecimal() or int(epoch) > info.epoch:
                continue
            served = self.set.served.get(shard)
            is_here = served is not None and served.info.epoch >= info.epoch
            if self._node_id in info.members and not is_here:
                continue  # a copy goes on with it, or what was put aside may be the last there is
            log.info("removing %s, which is of no more use", path)
            self._remove(path)

    # -- beginning an epoch ----------------------------------------------------------------------

    async def _begin(self, local: LocalShard, served: Served) -> None:
        """As the leader of an epoch: begin it, once the one before is closed."""
        shard, info = served.info.id, served.info
        change = next((c for c in self.set.changes.values() if c.target_of(shard) == info), None)
        if change is None:
            return
        closed: set[str] = set()
        while local.group.is_leader and not served.machine.has_begun:
            await asyncio.gather(
                *(
                    self._ask_to_close(member, change, closed)
                    for member in change.old_members
                    if member not in closed
                )
            )
            if is_fenced(change.old_members, closed):
                failpoint("epoch.after_fence")
                try:
                    if change.source:
                        await self._say_origin(local, change)
                    deadline = self._clock.monotonic() + _CALL_S
                    await local.group.propose(encode(Begin(info.epoch)), deadline=deadline)
                    failpoint("epoch.after_begin")
                except AgentMemError as error:
                    log.info("epoch %d of %s does not begin yet: %s", info.epoch, shard, error)
                continue
            await asyncio.sleep(_BUSY_S)

    async def _say_origin(self, local: LocalShard, change: Change) -> None:
        shard, epoch = local.info.id, local.info.epoch
        digest, now_ms = self._rebased.get(shard, b""), self._clock.wall_ms()
        deadline = self._clock.monotonic() + _CALL_S
        # If it takes long it is in the log all the same, before the entry that begins the epoch.
        with suppress(DeadlineExceeded):
            entry = self.origin_entry(change.source, epoch, digest, now_ms)
            await local.group.propose(entry, deadline=deadline)

    async def _ask_to_close(self, member: str, change: Change, closed: set[str]) -> None:
        if member == self._node_id:
            if self.set.close(change.shard, change.from_epoch):
                closed.add(member)
            return
        if self._link is None or not self._routing.is_connected(member):
            return
        body = {"shard": change.shard, "epoch": change.from_epoch, "view": self.view_wire()}
        try:
            if await self._link.call(member, "replica.close", body, timeout=_CALL_S):
                closed.add(member)
        except AgentMemError as error:
            log.debug("%s has not closed %s: %s", member, change.shard, error)

    async def _on_close(self, _peer: str, body: dict[str, Any]) -> bool:
        """`replica.close`: the next epoch is founded; see that nobody reads the old one here."""
        await self.learn_view(body["view"])
        return self.set.close(body["shard"], body["epoch"])

    # -- what the conductor asks -----------------------------------------------------------------

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
        if not self.set.may_copy(target):
            return  # the instruction came late: its epoch has been founded since
        running = self._copies.get(target.id)
        staged = self.set.staged.get(target.id)
        is_same = staged is not None and (staged.info, staged.change_id) == (target, change.id)
        if is_same and staged is not None and staged.state is Staging.COMPLETE:
            return
        if running is not None and not running.done():
            if is_same:
                return
            running.cancel()
        if staged is None or not is_same or staged.machine is None:
            staged = self.set.begin_copy(target, change.id, change.from_epoch)
        if change.source:
            self._start(staged, self._restore(staged, change))
        else:
            self._start_copy(staged, change.shard, body["source"])

    async def stage_here(self, body: dict[str, Any]) -> None:
        await self._on_stage(self._node_id, body)

    @property
    def handlers(self) -> dict[str, Callable[..., Any]]:
        """By method; for calls of this node to itself."""
        return self._handlers

    # -- copying ---------------------------------------------------------------------------------

    def _start_copy(self, staged: Staged, shard: str, source: str) -> None:
        self._start(staged, self._copy(staged, shard, source))

    def _start(self, staged: Staged, work: Coroutine[Any, Any, None]) -> None:
        before = self._copies.get(staged.info.id)

        async def run() -> None:
            try:
                if before is not None:
                    await until_over(before)  # it may have a thread that has not ended
            except BaseException:
                work.close()
                raise
            await work

        task = asyncio.create_task(run(), name=f"copy-{staged.info.id}")
        self._copies[staged.info.id] = task

        def ended(_: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, Exception):
                self._fail(staged, "its source", error)
            if self._copies.get(staged.info.id) is task:
                del self._copies[staged.info.id]

        task.add_done_callback(ended)

    async def _copy(self, staged: Staged, shard: str, source: str) -> None:
        """Copy `shard` from `source` and follow its log, until the copy is of use or fails."""
        folder = self._folder / staged.folder
        here = self._handlers if source == self._node_id else None
        if here is None and self._link is None:
            return
        ask = asker(self._link.call if self._link is not None else _no_link, source, here)
        staged.state, staged.error = Staging.COPYING, ""
        try:
            await self._end_last_attempt(staged, folder)
            if self._is_part(staged):
                await self._receive_part(staged, shard, folder, ask)
            elif staged.machine is None:
                await self._receive(staged, shard, folder, ask)
            await self._follow(staged, shard, ask)
        except (Paused, StateDamaged) as error:
            # What is here is of an older log, or it has rotted, at the source even: the next
            # attempt compares it, chunk by chunk.
            if self.set.staged.get(staged.info.id) is staged:  # else a replica by now, or dropped
                self._put_aside(staged, folder)
            self._fail(staged, source, error)
        except (AgentMemError, OSError, ValueError, KeyError) as error:
            self._fail(staged, source, error)

    async def _restore(self, staged: Staged, change: Change) -> None:
        """Make the next replica from a backup instead of a member's."""
        folder = self._folder / staged.folder
        staged.state, staged.error = Staging.COPYING, ""
        try:
            await self._end_last_attempt(staged, folder)
            if staged.machine is None:
                if folder.exists():
                    self._discard(folder)

                called_off = threading.Event()

                def progress(done: int, total: int) -> None:
                    if called_off.is_set():
                        raise ShuttingDown("Nobody waits for this copy any more.")
                    staged.done_bytes, staged.total_bytes = done, total

                fetching = partial(self.fetch, change.source, change.shard, folder, progress)
                try:
                    await unless_called_off(called_off.set, fetching)
                except asyncio.CancelledError:
                    if self.set.staged.get(staged.info.id) is not staged:
                        self._remove_fetched(folder)  # nobody goes on with it
                    raise
                state = self._open_shard(staged.info.id, folder)
                staged.machine = EpochMachine(state, staged.follows)
            await self._make_durable(staged)
            await self._complete(staged)
            while self.set.staged.get(staged.info.id) is staged:
                await self._make_durable(staged)
                self.poke()  # not settled here: that the record cannot be written fails no copy
                await asyncio.sleep(_BUSY_S)
        except (AgentMemError, OSError, ValueError, KeyError) as error:
            self._fail(staged, change.source, error)

    def _fail(self, staged: Staged, source: str, error: Exception) -> None:
        if self.set.staged.get(staged.info.id) is not staged:
            return  # it has become a replica meanwhile, or nobody wants it any more
        staged.state, staged.error = Staging.FAILED, str(error)
        log.warning("copying %s from %s: %s; trying again", staged.info.id, source, error)
        if isinstance(error, OSError):
            self._sweep_s = 0.0  # there may be room to make
        if not staged.change_id:
            del self.set.staged[staged.info.id]  # so that it is wanted again
            if staged.machine is not None:
                self._put_aside(staged, self._folder / staged.folder)
        elif _is_unsure(staged):
            # No other checkpoint of it would ever begin, and its pages may be lost: once more.
            self._put_aside(staged, self._folder / staged.folder)

    async def _receive(self, staged: Staged, shard: str, folder: Path, ask: Any) -> None:
        def progress(done: int, total: int) -> None:
            staged.done_bytes, staged.total_bytes = done, total

        begun_s = self._clock.monotonic()
        if folder.exists():
            self._put_aside(staged, folder)
        pace = Pace(self._copy_bytes_per_s, self._clock)
        _, term = await receive(ask, shard, staged.follows, folder, pace, progress)
        took_s = self._clock.monotonic() - begun_s
        log.info("copied %s: %s bytes in %.1f s", staged.info.id, f"{staged.total_bytes:,}", took_s)
        state = self._open_shard(staged.info.id, folder)
        try:
            await self._look_at(state)
        except RecordDamaged:
            state.abandon()
            self._put_aside(staged, folder)
            with suppress(AgentMemError):
                await ask("replica.suspect", {"shard": shard})
            raise
        except BaseException:
            state.abandon()
            raise
        staged.machine = EpochMachine(state, staged.follows)
        staged.last_term = term

    async def _look_at(self, state: Shard) -> None:
        """What rotted at the source has come with the rest. Raises RecordDamaged."""
        snapshot = state.open_snapshot()
        try:
            steps = state.scrub(snapshot)
            while await asyncio.to_thread(next, steps, None) is not None:
                pass
        finally:
            snapshot.close()

    async def _on_suspect(self, peer: str, body: dict[str, Any]) -> None:
        """`replica.suspect`: a copy of this node's replica is damaged."""
        log.warning("what %s copied of %s is not what was written", peer, body["shard"])
        self.on_suspect(body["shard"])

    def _put_aside(self, staged: Staged, folder: Path) -> None:
        """Let what is there serve the next attempt, chunk by chunk."""
        if staged.machine is not None:
            staged.machine.close()
            staged.machine = None
        staged.is_restricted = False
        if folder.exists():
            self._discard(partial_folder(folder))
            folder.rename(partial_folder(folder))

    async def _follow(self, staged: Staged, shard: str, ask: Any) -> None:
        machine = staged.machine
        assert machine is not None
        durable_s = 0.0
        while self.set.staged.get(staged.info.id) is staged:
            after = machine.inner.applied_index
            entries, applied = await tail(ask, shard, staged.follows, after)
            if self.set.staged.get(staged.info.id) is not staged:
                return  # it became a replica meanwhile, or is not wanted any more
            failpoint("copying.after_tail")
            staged.apply(entries)
            if machine.is_sealed and staged.follows < staged.info.epoch:
                if self._is_part(staged) and not staged.is_restricted:
                    await self._restrict(staged, machine)
                    failpoint("copying.after_restrict")
                await self._make_durable(staged)
                await self._complete(staged)
                failpoint("copying.after_complete")
                self.poke()  # not settled here: that the record cannot be written fails no copy
                return
            if applied - machine.inner.applied_index > 0 and entries:
                continue
            if staged.follows == staged.info.epoch:
                staged.state = Staging.FOLLOWING
                await self._make_durable(staged)
                self.poke()
            elif self._clock.monotonic() >= durable_s:
                # Before it is said to follow: so that little is left after the seal.
                await self._make_durable(staged)
                durable_s = self._clock.monotonic() + _DURABLE_EVERY_S
            staged.state = Staging.FOLLOWING
            await asyncio.sleep(_TAIL_POLL_S)

    async def _make_usable(self, staged: Staged) -> None:
        await self._make_durable(staged)
        self.poke()

    async def _complete(self, staged: Staged) -> None:
        """What only the record refuses is tried again: the copy is as good as before."""
        while self.set.staged.get(staged.info.id) is staged:
            try:
                self.set.complete(staged)
                return
            except OSError as error:
                log.warning("cannot note that %s is copied: %s", staged.info.id, error)
            await asyncio.sleep(_RETRY_S)

    def _is_part(self, staged: Staged) -> bool:
        return any(
            change.id == staged.change_id and change.is_split
            for change in self.set.changes.values()
        )

    async def _receive_part(self, staged: Staged, shard: str, folder: Path, ask: Any) -> None:
        """Receive the whole, and remove what is the other part's while writes go on: what is left
        to do when the whole's log has ended keeps them waiting."""
        async with self._parting:
            if staged.machine is None:
                await self._receive(staged, shard, folder, ask)
            if staged.is_restricted:
                return
            assert staged.machine is not None
            part = staged.machine.inner
            assert isinstance(part, Shard)
            begun_s = durable_s = self._clock.monotonic()
            for _ in part.trim(staged.info.slot_start, staged.info.slot_end):
                failpoint("copying.while_trimming")
                now_s = self._clock.monotonic()
                # As long as it took: requests have at least half of this thread.
                await asyncio.sleep(now_s - begun_s)
                if now_s >= durable_s + _DURABLE_EVERY_S:
                    await self._make_durable(staged)  # little at a time, and pages come free
                    # Nothing is applied yet; but the source keeps its log for who asks for it.
                    await tail(ask, shard, staged.follows, part.applied_index)
                    durable_s = self._clock.monotonic()
                begun_s = self._clock.monotonic()

    async def _restrict(self, staged: Staged, machine: EpochMachine) -> None:
        shard = machine.inner
        assert isinstance(shard, Shard)
        for _ in shard.restrict(staged.info.slot_start, staged.info.slot_end):
            await asyncio.sleep(0)
        staged.is_restricted = True  # twice would be another digest than the other replicas'

    async def _make_durable(self, staged: Staged) -> None:
        """Raises InternalError, OSError: what the disk has of the copy is unknown then."""
        machine = staged.machine
        assert machine is not None
        job = machine.checkpoint()
        if job is None:
            if machine.durable_index < machine.inner.applied_index:
                raise InternalError(
                    f"The copy of {staged.info.id} here cannot be written to the disk any more.",
                    hint="It is made again by itself; look after the disk when this comes again.",
                )
            return
        while True:
            sync = asyncio.create_task(asyncio.to_thread(job.run))
            sync.add_done_callback(lambda sync: sync.cancelled() or sync.exception())
            self._syncs[staged.folder] = sync
            try:
                await asyncio.shield(sync)  # the thread goes on, whoever ends this copy
                break
            except DiskFull as error:
                staged.error = str(error)
                log.warning("the copy of %s waits for room: %s", staged.info.id, error)
                self._sweep_s = 0.0
                await asyncio.sleep(_RETRY_S)
        machine.checkpoint_done(job)

    async def _end_last_attempt(self, staged: Staged, folder: Path) -> None:
        """The one before may have been given up while a thread was syncing this very folder."""
        sync = self._syncs.pop(staged.folder, None)
        if sync is not None:
            await asyncio.wait([sync])
        if _is_unsure(staged):
            self._put_aside(staged, folder)

    def _drop(self, staged: Staged) -> None:
        task = self._copies.get(staged.info.id)
        if task is not None:
            task.cancel()
        if staged.machine is not None:
            state = staged.machine.inner
            assert isinstance(state, Shard)
            self._lingering.append((self._clock.monotonic(), state, self._folder / staged.folder))
        else:
            self._discard(self._folder / staged.folder)

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


def _no_backups(source: str, *_: Any) -> NoReturn:
    raise Unavailable(f"This node cannot read the backup {source}.")


async def _no_link(*_: Any, **__: Any) -> Any:
    raise NotLeader("This node runs alone.")


def _is_unsure(staged: Staged) -> bool:
    """Whether a checkpoint of a copy was begun and never known to be on the disk, or its state
    failed: nothing that is tried on it would ever succeed."""
    if staged.machine is None:
        return False
    state = staged.machine.inner
    assert isinstance(state, Shard)
    return state.is_checkpointing or state.has_failed


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
