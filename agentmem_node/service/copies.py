"""The copies that this node makes, to be replicas of the next epochs: each has a task that receives
it and follows its source's log, until it takes part or nobody wants it any more.

Which are wanted, `agentmem_cluster.epochs.replicas` decides; how bytes travel is `copying.py`. What
the map gives this node and it does not have, it copies by itself: nobody has to ask.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.replicas import ReplicaSet, Staged
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.errors import (
    AgentMemError,
    DiskFull,
    InternalError,
    NotLeader,
    ShuttingDown,
    StateDamaged,
    Unavailable,
)
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link.link import Link
from agentmem_cluster.runtime import Clock
from agentmem_cluster.shardmap import ShardInfo
from agentmem_node.engine.shard import Shard
from agentmem_node.service.copying import Ask, Pace, Paused, asker, receive, tail
from agentmem_node.service.folders import Folders
from agentmem_node.service.routing import Routing
from agentmem_node.service.threads import unless_called_off, until_over
from agentmem_node.storage.checkpoint import RecordDamaged

log = logging.getLogger("agentmem.replicas")

_BUSY_S: Final = 0.01
_TAIL_POLL_S: Final = 0.01
_RETRY_S: Final = 1.0
_DURABLE_EVERY_S: Final = 1.0

OpenShard = Callable[[str, Path], Shard]
Handlers = dict[str, Callable[..., Any]]
# Fetches a shard out of a backup (source, shard, folder, progress); blocks.
Fetch = Callable[[str, str, Path, Callable[[int, int], None]], None]


def no_backups(source: str, *_: Any) -> NoReturn:
    raise Unavailable(f"This node cannot read the backup {source}.")


class Copies:
    def __init__(
        self,
        replicas: ReplicaSet,
        folders: Folders,
        *,
        link: Link | None,
        routing: Routing,
        clock: Clock,
        here: Handlers,
        open_shard: OpenShard,
        bytes_per_s: int,
        on_change: Callable[[], None],
    ) -> None:
        """`here`: what a source answers by, for copies of this node's own replicas.
        `on_change()`: a copy has become of use."""
        self._set = replicas
        self._folders = folders
        self._link = link
        self._routing = routing
        self._clock = clock
        self._here = here
        self._open_shard = open_shard
        self._bytes_per_s = bytes_per_s
        self._on_change = on_change
        self.fetch: Fetch = no_backups
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._retry_s: dict[str, float] = {}
        self._syncs: dict[str, asyncio.Task[None]] = {}  # by folder
        # One part of a split at a time is received here: two together would hold up requests.
        self._parting = asyncio.Lock()

    # -- life ------------------------------------------------------------------------------------

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        for staged in self._set.staged.values():
            if staged.machine is not None:
                staged.machine.close()

    def step(self, now_s: float) -> None:
        """Begin, or begin again, what nobody has to ask for; drop what nobody wants any more."""
        for info in self._set.wanted():
            if self._is_due(info.id, now_s):
                self._copy_wanted(info)
        for staged, change in self._set.restored_again():
            if staged.info.id not in self._tasks and self._is_due(staged.info.id, now_s):
                self._start(staged, self._restore(staged, change))
        for staged in self._set.staged.values():
            machine = staged.machine
            if (
                staged.state is Staging.COMPLETE
                and machine is not None
                and machine.durable_index < machine.inner.applied_index  # rebased after a start
                and staged.info.id not in self._tasks
            ):
                self._start(staged, self._make_usable(staged))
        if self._set.map is not None:
            for staged in self._set.drop_copies(list(self._set.staged.values())):
                self._drop(staged)

    def _is_due(self, shard: str, now_s: float) -> bool:
        if now_s < self._retry_s.get(shard, 0.0):
            return False
        self._retry_s[shard] = now_s + _RETRY_S
        return True

    def _copy_wanted(self, info: ShardInfo) -> None:
        running = self._tasks.get(info.id)
        if running is not None:
            running.cancel()  # it follows an epoch that is over; what it began may end
            return
        source = self._serving_member(info)
        if source is None:
            return
        failed = self._set.staged.get(info.id)
        if failed is not None and failed.machine is not None:
            self._put_aside(failed)
        staged = self._set.begin_copy(info, "", info.epoch)
        self._start(staged, self._copy(staged, info.id, source))

    def _serving_member(self, info: ShardInfo) -> str | None:
        leader = self._routing.leader_of(info.id)
        members = sorted(info.members, key=lambda m: m == leader)
        for member in members:
            if member != self._set.node_id and self._routing.is_connected(member):
                return member
        return None

    def stage(self, change: Change, target: ShardInfo, source: str) -> None:
        """Begin the copy for a change's target, or go on with another source."""
        if not self._set.may_copy(target):
            return  # the instruction came late: its epoch has been founded since
        running = self._tasks.get(target.id)
        staged = self._set.staged.get(target.id)
        is_same = staged is not None and (staged.info, staged.change_id) == (target, change.id)
        if is_same and staged is not None and staged.state is Staging.COMPLETE:
            return
        if running is not None and not running.done():
            if is_same:
                return
            running.cancel()
        if staged is None or not is_same or staged.machine is None:
            staged = self._set.begin_copy(target, change.id, change.from_epoch)
        if change.source:
            self._start(staged, self._restore(staged, change))
        else:
            self._start(staged, self._copy(staged, change.shard, source))

    def _start(self, staged: Staged, work: Coroutine[Any, Any, None]) -> None:
        before = self._tasks.get(staged.info.id)

        async def run() -> None:
            try:
                if before is not None:
                    await until_over(before)  # it may have a thread that has not ended
            except BaseException:
                work.close()
                raise
            await work

        task = asyncio.create_task(run(), name=f"copy-{staged.info.id}")
        self._tasks[staged.info.id] = task

        def ended(_: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, Exception):
                self._fail(staged, "its source", error)
            if self._tasks.get(staged.info.id) is task:
                del self._tasks[staged.info.id]

        task.add_done_callback(ended)

    # -- of another replica ----------------------------------------------------------------------

    async def _copy(self, staged: Staged, shard: str, source: str) -> None:
        """Copy `shard` from `source` and follow its log, until the copy is of use or fails."""
        here = self._here if source == self._set.node_id else None
        if here is None and self._link is None:
            return
        ask = asker(self._link.call if self._link is not None else _no_link, source, here)
        staged.state, staged.error = Staging.COPYING, ""
        try:
            await self._end_last_attempt(staged)
            if self._is_part(staged):
                await self._receive_part(staged, shard, ask)
            elif staged.machine is None:
                await self._receive(staged, shard, ask)
            await self._follow(staged, shard, ask)
        except (Paused, StateDamaged) as error:
            # What is here is of an older log, or it has rotted, at the source even: the next
            # attempt compares it, chunk by chunk.
            if self._is_wanted(staged):  # else a replica by now, or dropped
                self._put_aside(staged)
            self._fail(staged, source, error)
        except (AgentMemError, OSError, ValueError, KeyError) as error:
            self._fail(staged, source, error)

    async def _receive(self, staged: Staged, shard: str, ask: Ask) -> None:
        def progress(done: int, total: int) -> None:
            staged.done_bytes, staged.total_bytes = done, total

        begun_s = self._clock.monotonic()
        folder = self._folders.path(staged.folder)
        if folder.exists():
            self._put_aside(staged)
        pace = Pace(self._bytes_per_s, self._clock)
        _, term = await receive(ask, shard, staged.follows, folder, pace, progress)
        took_s = self._clock.monotonic() - begun_s
        log.info("copied %s: %s bytes in %.1f s", staged.info.id, f"{staged.total_bytes:,}", took_s)
        state = self._open_shard(staged.info.id, folder)
        try:
            await _look_at(state)
        except RecordDamaged:
            state.abandon()
            self._put_aside(staged)
            with suppress(AgentMemError):
                await ask("replica.suspect", {"shard": shard})
            raise
        except BaseException:
            state.abandon()
            raise
        staged.machine = EpochMachine(state, staged.follows)
        staged.last_term = term

    async def _follow(self, staged: Staged, shard: str, ask: Ask) -> None:
        machine = staged.machine
        assert machine is not None
        durable_s = 0.0
        while self._is_wanted(staged):
            after = machine.inner.applied_index
            entries, applied = await tail(ask, shard, staged.follows, after)
            if not self._is_wanted(staged):
                return
            failpoint("copying.after_tail")
            staged.apply(entries)
            if machine.is_sealed and staged.follows < staged.info.epoch:
                if self._is_part(staged) and not staged.is_restricted:
                    await self._restrict(staged, machine)
                    failpoint("copying.after_restrict")
                await self._make_durable(staged)
                await self._complete(staged)
                failpoint("copying.after_complete")
                self._on_change()  # that the record cannot be written then fails no copy
                return
            if applied - machine.inner.applied_index > 0 and entries:
                continue
            if staged.follows == staged.info.epoch:
                staged.state = Staging.FOLLOWING
                await self._make_durable(staged)
                self._on_change()
            elif self._clock.monotonic() >= durable_s:
                # Before it is said to follow: so that little is left after the seal.
                await self._make_durable(staged)
                durable_s = self._clock.monotonic() + _DURABLE_EVERY_S
            staged.state = Staging.FOLLOWING
            await asyncio.sleep(_TAIL_POLL_S)

    # -- of a part of one that is split ----------------------------------------------------------

    def _is_part(self, staged: Staged) -> bool:
        return any(
            change.id == staged.change_id and change.is_split
            for change in self._set.changes.values()
        )

    async def _receive_part(self, staged: Staged, shard: str, ask: Ask) -> None:
        """Receive the whole, and remove what is the other part's while writes go on: what is left
        to do when the whole's log has ended keeps them waiting."""
        async with self._parting:
            if staged.machine is None:
                await self._receive(staged, shard, ask)
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

    # -- out of a backup -------------------------------------------------------------------------

    async def _restore(self, staged: Staged, change: Change) -> None:
        """Make the next replica from a backup instead of a member's."""
        staged.state, staged.error = Staging.COPYING, ""
        try:
            await self._end_last_attempt(staged)
            if staged.machine is None:
                await self._fetch(staged, change)
            await self._make_durable(staged)
            await self._complete(staged)
            while self._is_wanted(staged):
                await self._make_durable(staged)
                self._on_change()  # that the record cannot be written then fails no copy
                await asyncio.sleep(_BUSY_S)
        except (AgentMemError, OSError, ValueError, KeyError) as error:
            self._fail(staged, change.source, error)

    async def _fetch(self, staged: Staged, change: Change) -> None:
        called_off = threading.Event()

        def progress(done: int, total: int) -> None:
            if called_off.is_set():
                raise ShuttingDown("Nobody waits for this copy any more.")
            staged.done_bytes, staged.total_bytes = done, total

        folder = self._folders.path(staged.folder)
        if folder.exists():
            self._folders.discard(staged.folder)
        fetching = partial(self.fetch, change.source, change.shard, folder, progress)
        try:
            await unless_called_off(called_off.set, fetching)
        except asyncio.CancelledError:
            if not self._is_wanted(staged):
                self._folders.discard_fetched(staged.folder)  # nobody goes on with it
            raise
        staged.machine = EpochMachine(self._open_shard(staged.info.id, folder), staged.follows)

    # -- of whichever kind -----------------------------------------------------------------------

    def _is_wanted(self, staged: Staged) -> bool:
        """Else it has become a replica meanwhile, or nobody wants it any more."""
        return self._set.staged.get(staged.info.id) is staged

    async def _make_usable(self, staged: Staged) -> None:
        await self._make_durable(staged)
        self._on_change()

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
                self._folders.sweep_soon()
                await asyncio.sleep(_RETRY_S)
        machine.checkpoint_done(job)

    async def _complete(self, staged: Staged) -> None:
        """What only the record refuses is tried again: the copy is as good as before."""
        while self._is_wanted(staged):
            try:
                self._set.complete(staged)
                return
            except OSError as error:
                log.warning("cannot note that %s is copied: %s", staged.info.id, error)
            await asyncio.sleep(_RETRY_S)

    async def _end_last_attempt(self, staged: Staged) -> None:
        """The one before may have been given up while a thread was syncing this very folder."""
        sync = self._syncs.pop(staged.folder, None)
        if sync is not None:
            await asyncio.wait([sync])
        if _is_unsure(staged):
            self._put_aside(staged)

    def _fail(self, staged: Staged, source: str, error: Exception) -> None:
        if not self._is_wanted(staged):
            return
        staged.state, staged.error = Staging.FAILED, str(error)
        log.warning("copying %s from %s: %s; trying again", staged.info.id, source, error)
        if isinstance(error, OSError):
            self._folders.sweep_soon()
        if not staged.change_id:
            del self._set.staged[staged.info.id]  # so that it is wanted again
            if staged.machine is not None:
                self._put_aside(staged)
        elif _is_unsure(staged):
            # No other checkpoint of it would ever begin, and its pages may be lost: once more.
            self._put_aside(staged)

    def _put_aside(self, staged: Staged) -> None:
        """Let what is there serve the next attempt, chunk by chunk."""
        if staged.machine is not None:
            staged.machine.close()
            staged.machine = None
        staged.is_restricted = False
        self._folders.put_aside(staged.folder)

    def _drop(self, staged: Staged) -> None:
        task = self._tasks.get(staged.info.id)
        if task is not None:
            task.cancel()
        if staged.machine is None:
            self._folders.discard(staged.folder)
            return
        state = staged.machine.inner
        assert isinstance(state, Shard)
        self._folders.let_go(staged.folder, state)


async def _look_at(state: Shard) -> None:
    """What rotted at the source has come with the rest. Raises RecordDamaged."""
    snapshot = state.open_snapshot()
    try:
        steps = state.scrub(snapshot)
        while await asyncio.to_thread(next, steps, None) is not None:
            pass
    finally:
        snapshot.close()


def _is_unsure(staged: Staged) -> bool:
    """Whether a checkpoint of a copy was begun and never known to be on the disk, or its state
    failed: nothing that is tried on it would ever succeed."""
    if staged.machine is None:
        return False
    state = staged.machine.inner
    assert isinstance(state, Shard)
    return state.is_checkpointing or state.has_failed


async def _no_link(*_: Any, **__: Any) -> Any:
    raise NotLeader("This node runs alone.")
