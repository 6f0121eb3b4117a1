"""All the replica groups of one node, without I/O: inputs go in, a flush and frames come out.

The driver (`host.Host` on a real machine, the simulator elsewhere) calls `tick` when an input
arrived or at `next_wakeup`, runs the flush that it returns in its own time, reports it with
`synced`, and sends whatever `take_outbox` gives after each of these. One flush at a time is
under way; inputs go on meanwhile, and what they make the node promise waits for the next one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from agentmem_cluster.errors import AgentMemError, DiskFull, ShuttingDown, Unavailable, WrongShard
from agentmem_cluster.raft.api import Applied, Entry, GroupSpec, GroupStatus, StateMachine
from agentmem_cluster.raft.checkpoints import CheckpointJob, Checkpoints, is_full
from agentmem_cluster.raft.frames import BOOT_BYTES, well_formed
from agentmem_cluster.raft.gate import Gate
from agentmem_cluster.raft.group import Group
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.runtime import Clock, Rng

__all__ = ["CheckpointJob", "FlushJob", "NodeCore", "NodeJournal", "Ready"]

log = logging.getLogger(__name__)


class FlushJob(Protocol):
    def run(self) -> None:
        """Sync what the flush has written. May run in another thread; raises OSError."""
        ...


class NodeJournal(Protocol):
    """What the core asks of the node's journal (`agentmem_cluster.journal`)."""

    def group(self, group_id: str, epoch: int, base_index: int = 0, base_term: int = 0) -> Any: ...
    def drop_group(self, group_id: str, epoch: int) -> None: ...
    def begin_flush(self) -> FlushJob | None: ...
    def flushed(self, job: Any) -> None: ...
    def reclaim(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ready:
    """Work for the driver: a flush to run, or only frames to send (`job` is None)."""

    job: FlushJob | None


class NodeCore:
    def __init__(
        self,
        node_id: str,
        journal: NodeJournal,
        clock: Clock,
        rng: Rng,
        settings: RaftSettings,
        *,
        session_of_boot: bytes | None = None,
    ) -> None:
        self.node_id = node_id
        self.fatal: BaseException | None = None
        self.counters: Counter[str] = Counter()
        self._journal = journal
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._boot = session_of_boot or rng.token(BOOT_BYTES)
        self._gate = Gate()
        self._groups: dict[str, Group] = {}
        self._active: dict[str, None] = {}  # in the order in which they were touched
        self._wakeups: dict[str, float] = {}
        self._up: dict[str, int] = {}
        self._told: list[tuple[Callable[[Any], None], Any]] = []
        self._telling = False
        self._checkpoints = Checkpoints(settings.disk_retry_s)
        self._disk_full: DiskFull | None = None
        self._disk_retry_s = 0.0

    # -- groups --

    def add_group(self, spec: GroupSpec, machine: StateMachine) -> None:
        """Serve a group. Raises `LogBehind` when journal and state do not belong together."""
        if spec.id in self._groups:
            raise ValueError(f"group {spec.id} is served here already")
        if self.node_id not in spec.members:
            raise ValueError(f"{self.node_id} is not a member of {spec.id}: {spec.members}")
        group = Group(
            self.node_id,
            spec,
            machine,
            self._journal.group(spec.id, spec.epoch, spec.base_index, spec.base_term),
            self._clock,
            self._rng,
            self._settings,
            self._gate,
            self._boot,
            self._tell,
        )
        group.disk_full = self._disk_full
        self._groups[spec.id] = group
        for peer in self._up:
            group.peer_up(peer)
        self._touch(spec.id)

    def remove_group(self, group_id: str) -> None:
        group = self._groups.pop(group_id, None)
        if group is not None:
            self._active.pop(group_id, None)
            self._wakeups.pop(group_id, None)
            self._checkpoints.forget(group_id)
            group.abandon()
            self._tell_all()

    def drop_log(self, group_id: str, epoch: int) -> None:
        """Forget the log of an epoch that this node serves no more."""
        group = self._groups.get(group_id)
        if group is not None and group.spec.epoch == epoch:
            raise ValueError(f"epoch {epoch} of group {group_id} is served here")
        self._journal.drop_group(group_id, epoch)
        self._gate.mark()

    def checkpoint_soon(self, group_id: str) -> None:
        """Make what is applied now durable, without waiting for the usual time."""
        group = self._groups.get(group_id)
        if group is not None:
            group.checkpoint_soon()
            self._touch(group_id)

    def retain(self, group_id: str, index: int | None) -> None:
        """Keep a group's entries after `index`, up to a bound; None: no more."""
        group = self._groups.get(group_id)
        if group is not None:
            group.retain(index)

    def read_log(self, group_id: str, after: int, bytes_max: int) -> list[Entry]:
        """Entries after `after` that are applied here, at least one if there is any.

        Raises IndexError when they were compacted, KeyError when the group is not here.
        """
        group = self._groups[group_id]
        last = group.status().applied_index
        return [] if after >= last else group.log.slice(after + 1, last, bytes_max)

    def term_at(self, group_id: str, index: int) -> int:
        """The term of an entry that the log still has. Raises IndexError, KeyError."""
        term: int = self._groups[group_id].log.term_at(index)
        return term

    # -- inputs --

    def peer_up(self, peer: str, session: int) -> None:
        if peer in self._up:
            self.peer_down(peer)
        self._up[peer] = session
        for group_id, group in self._groups.items():
            group.peer_up(peer)
            self._touch(group_id)

    def peer_down(self, peer: str) -> None:
        if self._up.pop(peer, None) is None:
            return
        self._gate.forget(peer)
        for group_id, group in self._groups.items():
            group.peer_down(peer)
            self._touch(group_id)

    def receive(self, peer: str, frames: list[Any]) -> None:
        """Frames from an authenticated peer. What is malformed or a stranger's is dropped."""
        if self.fatal is not None:
            return
        for frame in frames:
            if not well_formed(frame):
                self.counters["frames_malformed"] += 1
                continue
            group = self._groups.get(frame[1])
            if group is None or group.spec.epoch != frame[2]:
                self.counters["frames_strange"] += 1
                continue
            try:
                if not group.receive(peer, frame):
                    self.counters["frames_strange"] += 1
                    continue
            except Exception as error:
                self._fail(error)
                return
            self._active[frame[1]] = None
        self._tell_all()

    def propose(
        self, group_id: str, command: bytes, done: Callable[[Applied | AgentMemError], None]
    ) -> None:
        """Ask for a command to be replicated and applied; `done` is called at most once.

        Refused with NotLeader, Overloaded, TooLarge or DiskFull at once: certainly not done.
        """
        group = self._group_for(group_id, done)
        if group is not None:
            group.propose(command, done)
            self._active[group_id] = None
        if self._told:
            self._tell_all()

    def read_index(
        self,
        group_id: str,
        done: Callable[[int | AgentMemError], None],
        until_s: float = float("inf"),
    ) -> None:
        """On any replica: `done(index)` once a quorum confirmed it *and* it is applied here.

        From `until_s` on nobody waits any more, and `done` may never be called. A replica that
        waits to be re-seeded refuses at once: another one is to be asked.
        """
        group = self._group_for(group_id, done)
        if group is not None and group.needs_reseed:
            self._tell(
                done,
                Unavailable(
                    f"The replica of {group_id} here is too far behind, and is to be copied anew.",
                    hint="Ask another node.",
                ),
            )
        elif group is not None:
            group.reads.ask(done, until_s)
            self._active[group_id] = None
        if self._told:
            self._tell_all()

    def when_applied(
        self,
        group_id: str,
        index: int,
        done: Callable[[int | AgentMemError], None],
        until_s: float = float("inf"),
    ) -> None:
        """`done(index)` once that entry is applied here; perhaps never from `until_s` on."""
        group = self._group_for(group_id, done)
        if group is not None:
            group.reads.wait_applied(index, done, until_s)
            self._active[group_id] = None
        if self._told:
            self._tell_all()

    def read_now(self, group_id: str) -> int | None:
        """The index at once, where one member is the quorum; None: ask `read_index`."""
        group = self._groups.get(group_id)
        return None if group is None or self.fatal is not None else group.reads.at_once()

    def transfer(self, group_id: str, to: str | None = None) -> None:
        """Hand leadership over, to the follower with most if none is named. No-op elsewhere."""
        group = self._groups.get(group_id)
        if group is not None:
            group.transfer(to)
            self._touch(group_id)

    # -- driving --

    def tick(self) -> Ready | None:
        """Run what is due. Ready when there is something to sync or to send."""
        if self.fatal is not None:
            return None
        now_s = self._clock.monotonic()
        due = self._active
        for group_id, at_s in self._wakeups.items():
            if at_s <= now_s:
                due[group_id] = None
        self._active = {}
        try:
            for group_id in due:
                group = self._groups.get(group_id)
                if group is None:
                    continue
                if group.tick(now_s):
                    self._active[group_id] = None
                self._checkpoints.due(group_id, group.checkpoint_due_s())
                self._wakeups[group_id] = group.next_wakeup()
            self._checkpoints.tick(now_s)
            turn = self._checkpoints.turn(now_s)
            if turn is not None:
                self._checkpoints.begin(turn, self._groups[turn].checkpoint(now_s))
            job = self._begin_flush(now_s)
        except Exception as error:
            self._fail(error)
            return None
        self._tell_all()
        return Ready(job) if job is not None or self._gate.open else None

    def synced(self, ready: Ready) -> None:
        """`ready.job.run()` is done: what it covers may be spoken of, counted and applied."""
        if ready.job is None or self.fatal is not None:
            return
        self._journal.flushed(ready.job)
        self._gate.flush_ended()
        if self._disk_full is not None:
            self._set_disk_full(None)
        for group_id, group in self._groups.items():
            if group.synced():
                self._active[group_id] = None

    def sync_failed(self, ready: Ready, error: OSError) -> None:
        """No room: the journal writes the same again later. Anything else stops the node."""
        if is_full(error):
            self._gate.flush_failed()
            self._wait_for_room(error, self._clock.monotonic())
        else:
            self._fail(error)

    def take_outbox(self) -> list[tuple[str, list[Any]]]:
        """(peer, frames) that may leave now: all that they say is on disk."""
        return [] if self.fatal is not None else self._gate.take()

    def next_wakeup(self) -> float:
        """When `tick` is due without any further input, on the clock."""
        if self._active:
            return self._clock.monotonic()
        soonest = min(self._wakeups.values(), default=float("inf"))
        soonest = min(soonest, self._checkpoints.next_wakeup())
        if self._disk_full is not None and not self._gate.flushing:
            # Nothing else would wake a node whose every promise waits for room.
            soonest = min(soonest, self._disk_retry_s)
        return soonest

    # -- checkpoints --

    def take_checkpoints(self) -> list[CheckpointJob]:
        return self._checkpoints.take()

    def checkpointed(self, checkpoint: CheckpointJob) -> None:
        """`checkpoint.job.run()` is done: the journal may let go of what it covers."""
        if self.fatal is not None or not self._checkpoints.done(checkpoint):
            return
        group = self._groups[checkpoint.group_id]
        try:
            if group.checkpointed(checkpoint.job):
                self._journal.reclaim()
        except Exception as error:
            self._fail(error)
        self._touch(checkpoint.group_id)

    def checkpoint_failed(self, checkpoint: CheckpointJob, error: BaseException) -> None:
        """No room: the same job is run again later. Anything else stops the node."""
        if not is_full(error):
            self._fail(error)
            return
        self.counters["checkpoints_without_room"] += 1
        if self._checkpoints.without_room(checkpoint, self._clock.monotonic()):
            log.warning("a checkpoint of group %s waits for room: %s", checkpoint.group_id, error)

    # -- views --

    def status(self, group_id: str) -> GroupStatus:
        return self._groups[group_id].status()

    def is_leader(self, group_id: str) -> bool:
        group = self._groups.get(group_id)
        return group is not None and group.member.is_leader

    def leader(self, group_id: str) -> str | None:
        group = self._groups.get(group_id)
        return None if group is None else group.member.leader

    def needs_reseed(self, group_id: str) -> bool:
        """This replica is so far behind that no log has what it lacks: only a re-seed helps."""
        return self._groups[group_id].needs_reseed

    def group_ids(self) -> list[str]:
        return list(self._groups)

    @property
    def disk_full(self) -> bool:
        return self._disk_full is not None

    # -- inside --

    def _begin_flush(self, now_s: float) -> FlushJob | None:
        if not self._gate.wants_flush:
            return None
        if self._disk_full is not None and now_s < self._disk_retry_s:
            return None
        try:
            job = self._journal.begin_flush()
        except OSError as error:
            if not is_full(error):
                raise
            self._wait_for_room(error, now_s)
            return None
        self._gate.flush_begun()
        if job is None:
            self._gate.flush_ended()
        return job

    def _wait_for_room(self, error: OSError, now_s: float) -> None:
        self._disk_retry_s = now_s + self._settings.disk_retry_s
        if self._disk_full is not None:
            return
        self._set_disk_full(
            DiskFull(
                f"the disk of node {self.node_id} is full: {error}",
                hint="Free some space; the node goes on by itself.",
            )
        )
        for group_id, group in self._groups.items():
            group.transfer(None)  # another node's disk may have room
            self._active[group_id] = None

    def _set_disk_full(self, error: DiskFull | None) -> None:
        if error is not None:
            log.warning("%s", error)
        self._disk_full = error
        for group in self._groups.values():
            group.disk_full = error

    def _touch(self, group_id: str) -> None:
        if group_id in self._groups:
            self._active[group_id] = None

    def _tell(self, done: Callable[[Any], None], outcome: Any) -> None:
        """Later, when no group is in the middle of something: `done` may call back into us."""
        self._told.append((done, outcome))

    def _tell_all(self) -> None:
        if self._telling:
            return
        self._telling = True
        try:
            while self._told:
                told, self._told = self._told, []
                for done, outcome in told:
                    try:
                        done(outcome)
                    except Exception:
                        # It is the caller's bug; the entry is applied all the same, once (D5).
                        self.counters["callbacks_failed"] += 1
                        log.exception("a callback of a proposal or read failed")
        finally:
            self._telling = False

    def _group_for(self, group_id: str, done: Callable[[Any], None]) -> Group | None:
        group = self._groups.get(group_id)
        if self.fatal is not None:
            self._tell(done, ShuttingDown(f"node {self.node_id} has failed and is stopping"))
            return None
        if group is None:
            self._tell(
                done,
                WrongShard(
                    f"group {group_id} is not on node {self.node_id}",
                    hint="Refresh the shard map.",
                ),
            )
        return group

    def _fail(self, error: BaseException) -> None:
        if self.fatal is None:
            self.fatal = error
            log.error("node %s stops: %s", self.node_id, error, exc_info=error)
