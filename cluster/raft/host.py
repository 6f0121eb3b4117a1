"""A node's replica groups on asyncio: ticks when work arrives, syncs in a thread, sends at once.

Idle, it sleeps until the next heartbeat or election; a proposal wakes it in the same turn of the
loop, so everything proposed in one turn shares one tick, one flush and one append a follower.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from agentmem_cluster.errors import (
    AgentMemError,
    DeadlineExceeded,
    NotLeader,
    ShuttingDown,
    Unavailable,
    WrongShard,
)
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.raft.api import Applied, Entry, GroupSpec, GroupStatus, Role, StateMachine
from agentmem_cluster.raft.checkpoints import CheckpointJob
from agentmem_cluster.raft.core import NodeCore, NodeJournal, Ready
from agentmem_cluster.raft.deadlines import Deadlines
from agentmem_cluster.raft.frames import bursts
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.runtime import Clock, Rng

HAND_OVER_S_MAX = 2.0
# What is handed to the link at once: several large appends would be over its frame limit.
BURST_BYTES_MAX = 4 << 20


class RaftLink(Protocol):
    """What the host asks of the peer link (`agentmem_cluster.link`)."""

    on_raft: Callable[[str, list[Any]], None]
    on_up: Callable[[str, int], None]
    on_down: Callable[[str], None]

    def send_raft(self, peer: str, frames: list[Any]) -> bool: ...


class Host:
    def __init__(
        self,
        node_id: str,
        journal: NodeJournal,
        link: RaftLink | None,
        clock: Clock,
        rng: Rng,
        settings: RaftSettings,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.core = NodeCore(node_id, journal, clock, rng, settings)
        self.groups: dict[str, AsyncGroup] = {}
        self.clock = clock
        self._link = link
        self._on_fatal = on_fatal
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = float("inf")
        self._flusher = _Worker("raft-flush")
        self._checkpointer = _Worker("raft-checkpoint")
        self._stopped = False
        self._told_fatal = False
        self.deadlines = Deadlines(clock)
        if link is not None:
            link.on_raft = self._on_raft
            link.on_up = self._on_up
            link.on_down = self._on_down

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._flusher.start(self._loop)
        self._checkpointer.start(self._loop)
        self.deadlines.start(self._loop)
        self.wake()

    async def stop(self, *, transfer: bool = True) -> None:
        """Hand leaderships over (best effort), then end the threads. The journal stays open."""
        if self._loop is None or self._stopped:
            return
        if transfer:
            await self.hand_over()
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for group_id in list(self.groups):
            self.core.remove_group(group_id)
        self.groups.clear()
        self.deadlines.stop()
        await self._flusher.stop()
        await self._checkpointer.stop()

    async def hand_over(self) -> None:
        """Give every leadership away, as far as that is done within two seconds."""
        until_s = self.clock.monotonic() + HAND_OVER_S_MAX
        while self.clock.monotonic() < until_s and self.core.fatal is None:
            leading = [g for g in self.groups.values() if g.is_leader and len(g.spec.members) > 1]
            if not leading:
                return
            for group in leading:
                self.core.transfer(group.spec.id)
            self.wake()
            await asyncio.sleep(0.01)

    def add_group(self, spec: GroupSpec, machine: StateMachine) -> AsyncGroup:
        self.core.add_group(spec, machine)
        group = self.groups[spec.id] = AsyncGroup(self, spec, machine)
        self.wake()
        return group

    def remove_group(self, group_id: str) -> None:
        self.groups.pop(group_id, None)
        self.core.remove_group(group_id)

    def drop_log(self, group_id: str, epoch: int) -> None:
        self.core.drop_log(group_id, epoch)
        self.wake()

    def wake(self) -> None:
        """Tick in this turn of the loop, once, after whoever else is ready to run."""
        if not self._scheduled and self._loop is not None and not self._stopped:
            self._scheduled = True
            self._loop.call_soon(self._tick)

    # -- inside --

    def _on_raft(self, peer: str, frames: list[Any]) -> None:
        self.core.receive(peer, frames)
        self.wake()

    def _on_up(self, peer: str, session: int) -> None:
        self.core.peer_up(peer, session)
        self.wake()

    def _on_down(self, peer: str) -> None:
        self.core.peer_down(peer)
        self.wake()

    def _tick(self) -> None:
        self._scheduled = False
        if self._stopped:
            return
        core = self.core
        ready = core.tick()
        self._send()
        if ready is not None and ready.job is not None:
            self._flusher.submit(ready.job.run, lambda error: self._flushed(ready, error))
        for checkpoint in core.take_checkpoints():
            self._run_checkpoint(checkpoint)
        if core.fatal is not None:
            self._tell_fatal()
            return
        self._sleep()

    def _send(self) -> None:
        if self._link is None:
            return
        for peer, frames in self.core.take_outbox():
            failpoint("outbox.before_send")
            for burst in bursts(frames, BURST_BYTES_MAX):
                self._link.send_raft(peer, burst)  # what is refused, Raft says again

    def _flushed(self, ready: Ready, error: BaseException | None) -> None:
        if self._stopped:
            return
        if error is None:
            self.core.synced(ready)
        elif isinstance(error, OSError):
            self.core.sync_failed(ready, error)
        else:
            self.core.sync_failed(ready, OSError(f"the flush failed: {error!r}"))
        self._send()
        self._tick()

    def _run_checkpoint(self, checkpoint: CheckpointJob) -> None:
        def done(error: BaseException | None) -> None:
            if self._stopped:
                return
            if error is None:
                self.core.checkpointed(checkpoint)
            else:
                self.core.checkpoint_failed(checkpoint, error)
            self.wake()

        self._checkpointer.submit(checkpoint.job.run, done)

    def _sleep(self) -> None:
        """Arm the timer for the next wake-up. One that rings too early just arms it again."""
        assert self._loop is not None
        at_s = self.core.next_wakeup()
        now_s = self.clock.monotonic()
        if at_s <= now_s:
            self.wake()
            return
        if self._timer is not None:
            if self._timer_s <= at_s:
                return
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = self._loop.call_later(at_s - now_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_s = float("inf")
        if self._stopped:
            return
        if self.core.next_wakeup() <= self.clock.monotonic():
            self._tick()
        else:
            self._sleep()

    def _tell_fatal(self) -> None:
        if not self._told_fatal:
            self._told_fatal = True
            assert self.core.fatal is not None
            self._on_fatal(self.core.fatal)


class AsyncGroup:
    """One group, for coroutines."""

    def __init__(self, host: Host, spec: GroupSpec, machine: StateMachine) -> None:
        self.spec = spec
        self.machine = machine
        self._host = host
        self._core = host.core
        self._id = spec.id

    @property
    def is_leader(self) -> bool:
        return self._host.groups.get(self._id) is self and self._core.is_leader(self._id)

    @property
    def leader(self) -> str | None:
        return self._core.leader(self._id)

    @property
    def needs_reseed(self) -> bool:
        return self._core.needs_reseed(self._id)

    def status(self) -> GroupStatus:
        return self._core.status(self._id)

    async def propose(self, command: bytes, *, deadline: float) -> Applied:
        """Replicate and apply a command.

        NotLeader, Overloaded, TooLarge and DiskFull mean certainly not done; DeadlineExceeded
        and ShuttingDown mean unknown: retry under the same request id.
        """
        self._check()
        future: asyncio.Future[Applied] = self._future()
        self._core.propose(self._id, command, _resolver(future))
        if not future.done():
            self._host.wake()
            return await self._host.deadlines.wait(future, deadline, self._unknown)
        return future.result()

    async def read_index(self, *, deadline: float) -> int:
        """An index applied here that is not older than anything acknowledged before the call."""
        self._check()
        index = self._core.read_now(self._id)
        if index is not None:
            return index
        future: asyncio.Future[int] = self._future()
        self._core.read_index(self._id, _resolver(future), deadline)
        if not future.done():
            self._host.wake()
            return await self._host.deadlines.wait(future, deadline, self._slow_read)
        return future.result()

    async def wait_applied(self, index: int, *, deadline: float) -> None:
        """Return once entry `index` is visible in this node's state machine."""
        self._check()
        if self.machine.applied_index >= index:
            return
        future: asyncio.Future[int] = self._future()
        self._core.when_applied(self._id, index, _resolver(future), deadline)
        await self._host.deadlines.wait(future, deadline, self._slow_read)

    def checkpoint_soon(self) -> None:
        """Make what is applied durable now."""
        self._core.checkpoint_soon(self._id)
        self._host.wake()

    def read_log(self, after: int, bytes_max: int) -> list[Entry]:
        """Entries after `after` that are applied here. Raises IndexError when compacted."""
        return self._core.read_log(self._id, after, bytes_max)

    def term_at(self, index: int) -> int:
        """Raises IndexError when the log does not have that entry any more."""
        return self._core.term_at(self._id, index)

    def retain(self, index: int | None) -> None:
        """Keep the entries after `index` in the journal, up to a bound; None: no more."""
        self._core.retain(self._id, index)

    async def transfer(self, to: str | None, *, deadline: float) -> None:
        """Hand leadership over and wait until this node has lost it."""
        if not self.is_leader:
            raise NotLeader(f"{self.leader} leads group {self._id}", leader=self.leader)
        if len(self.spec.members) == 1 or to == self._core.node_id:
            raise Unavailable(f"group {self._id} has no other member to hand over to")
        while self.is_leader:
            if self._host.clock.monotonic() >= deadline:
                raise DeadlineExceeded(f"the hand-over of group {self._id} did not end in time")
            self._core.transfer(self._id, to)
            self._host.wake()
            await asyncio.sleep(0.01)

    def _check(self) -> None:
        """The group of another epoch may have taken this one's place."""
        if self._host.groups.get(self._id) is not self and not self._host._stopped:
            raise WrongShard(
                f"epoch {self.spec.epoch} of group {self._id} is no longer served here",
                hint="Refresh the shard map.",
            )

    def _future(self) -> asyncio.Future[Any]:
        loop = self._host._loop
        if loop is None or self._host._stopped:
            raise ShuttingDown("this node is not running")
        return loop.create_future()

    def _unknown(self) -> AgentMemError:
        return DeadlineExceeded(
            f"group {self._id} did not confirm the write in time; it may or may not happen",
            hint="Retry with the same request id (Idempotency-Key).",
        )

    def _slow_read(self) -> AgentMemError:
        return DeadlineExceeded(f"group {self._id} did not catch up in time", hint="Retry.")


def _resolver(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    def resolve(outcome: Any) -> None:
        if future.done():
            return  # its deadline was first, or the caller has gone
        if isinstance(outcome, AgentMemError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    return resolve


class _Worker:
    """One thread that runs blocking jobs in order and reports to the loop."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[
            tuple[Callable[[], None], Callable[[BaseException | None], None]] | None
        ] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def submit(self, run: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        self._jobs.put((run, done))

    async def stop(self) -> None:
        self._jobs.put(None)
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join, 10.0)

    def _work(self) -> None:
        assert self._loop is not None
        while (job := self._jobs.get()) is not None:
            run, done = job
            error: BaseException | None = None
            try:
                run()
            except BaseException as caught:
                error = caught
            try:
                self._loop.call_soon_threadsafe(done, error)
            except RuntimeError:
                return  # the loop is closed: nobody is left to tell


__all__ = ["AsyncGroup", "Host", "RaftLink", "Role"]
