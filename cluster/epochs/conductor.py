"""What is to be done next about a change of epoch: reports go in, instructions come out. No I/O.

Whoever leads the meta group asks the nodes that a change concerns for a report, again and again,
and carries out what this answers. Nothing here is needed after a crash: a new leader begins with
fresh reports, and every instruction may be given twice. What must not be forgotten is in the meta
group (`Change`), in the old epoch's log (the seal) and on the members' disks (`LocalRecord`).

The order that makes it safe:

1. Every new member has the state and follows the log; nobody is sealed before.
2. The old epoch is sealed by an entry of its own log, so a majority of it knows its final state.
3. The next epoch is founded, in the meta group, once a majority of *its* members has that state on
   disk. Before this the change can be redirected to other members, after it never.
4. The new epoch takes writes only after a majority of the old members has closed the old epoch
   for good (`agentmem_cluster.epochs.fence`): nobody can confirm a read of the old state then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.epochs.reports import Report, StagedReplica, Staging
from agentmem_cluster.shardmap import ShardInfo


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. How long a change waits for those that are slow before it goes on without."""

    # A copy that follows the log this closely (entries) is as good as caught up.
    lag_entries_max: int = 256
    # A member that does not answer this long may be left out of the new epoch's first majority.
    missing_s: float = 10.0
    # After the seal writes wait, so the last stragglers get only a moment ...
    straggler_s: float = 0.25
    # ... and when not even a majority came, the old members are taken again.
    redirect_s: float = 2.0
    # A copy that could not be made at all by then is given up.
    copy_s_max: float = 6 * 3_600.0
    retry_s: float = 1.0
    # How often a copy that comes out of a backup may be seen to have failed: what is damaged or
    # missing there stays so.
    fetches_max: int = 30


@dataclass(frozen=True, slots=True)
class Stage:
    """`node` is to copy `shard`'s next replica from `source`, and follow its log."""

    node: str
    shard: str
    source: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`node` is to make its old replica durable, so that little is left to sync after the seal."""

    node: str


@dataclass(frozen=True, slots=True)
class SealOld:
    """`node`, which leads the old epoch, is to propose its seal."""

    node: str


@dataclass(frozen=True, slots=True)
class Found:
    """The meta group is to name the next epoch."""

    base: Base


@dataclass(frozen=True, slots=True)
class Redirect:
    """The meta group is to give the next epoch the old members: too few of the new ones came."""

    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """All members serve: the change is over, and what is left of the old epoch may go."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It will not work: the old epoch just goes on, or, when it was sealed, another one is founded
    from its state."""

    reason: str


Instruction = Stage | Checkpoint | SealOld | Found | Redirect | Finish | GiveUp


class Conductor:
    """One change, as seen by one leader of the meta group."""

    def __init__(self, change: Change, now_s: float, timing: Timing | None = None) -> None:
        self.change = change
        self._timing = timing or Timing()
        self._began_s = now_s
        self._heard_s: dict[str, float] = {}
        self._asked_s: dict[Instruction, float] = {}
        self._sealed_s: float | None = None
        self._founded_s: float | None = None
        self._checkpoint_at: dict[str, int] | None = None
        self._failed: dict[str, int] = {}  # looks at a copy that failed, by node

    def step(
        self, change: Change, reports: Mapping[str, Report], now_s: float
    ) -> list[Instruction]:
        """`reports`: of the nodes that answered just now. The change may have moved on since."""
        if change != self.change:
            self.change = change
            self._asked_s.clear()
        for node in reports:
            self._heard_s[node] = now_s
        if change.phase is Phase.FOUNDED:
            return self._finish(reports, now_s)
        sealed = self._seal_of(reports)
        if sealed is not None:
            if self._sealed_s is None:
                self._sealed_s = now_s
            return self._found(reports, sealed, now_s)
        return self._copy(reports, now_s)

    # -- copying -------------------------------------------------------------------------------

    def _copy(self, reports: Mapping[str, Report], now_s: float) -> list[Instruction]:
        if now_s - self._began_s > self._timing.copy_s_max:
            return [GiveUp("the copy was not finished in time")]
        todo: list[Instruction] = []
        committed = max((r.old.applied_index for r in reports.values() if r.old), default=0)
        ready: dict[str, int] = {}
        waiting = False
        for target in self.change.targets:
            for member in target.members:
                report = reports.get(member)
                if report is None:
                    waiting |= not self._is_missing(member, now_s)
                elif self._is_ready(report, target, committed):
                    ready[target.id] = ready.get(target.id, 0) + 1
                else:
                    waiting = True
                    todo += self._stage(report, target, reports, now_s)
        enough = all(ready.get(t.id, 0) > len(t.members) // 2 for t in self.change.targets)
        leader = next((n for n, r in reports.items() if r.old and r.old.is_leader), None)
        if waiting or not enough or leader is None:
            self._checkpoint_at = None
            return todo
        return todo + self._seal(reports, leader, now_s)

    def _seal(self, reports: Mapping[str, Report], leader: str, now_s: float) -> list[Instruction]:
        """First a checkpoint of everybody who goes on with what it has, then the seal."""
        keeping = {
            node: r.old
            for node, r in reports.items()
            if r.old is not None
            and node in self.change.targets[0].members
            and self._goes_on(r, self.change.shard)
        }
        if self._checkpoint_at is None:
            self._checkpoint_at = {node: old.applied_index for node, old in keeping.items()}
        due = [
            Checkpoint(node)
            for node, old in keeping.items()
            if old.durable_index < self._checkpoint_at.get(node, 0)
        ]
        if due:
            return [one for one in due if self._ask(one, now_s)]
        seal = SealOld(leader)
        return [seal] if self._ask(seal, now_s) else []

    def _is_ready(self, report: Report, target: ShardInfo, committed: int) -> bool:
        if self._goes_on(report, target.id):
            assert report.old is not None
            return committed - report.old.applied_index <= self._timing.lag_entries_max
        staged = report.staged.get(target.id)
        return (
            staged is not None
            and staged.state in (Staging.FOLLOWING, Staging.COMPLETE)
            and (
                bool(self.change.source)
                or committed - staged.applied_index <= self._timing.lag_entries_max
            )
        )

    def _stage(
        self, report: Report, target: ShardInfo, reports: Mapping[str, Report], now_s: float
    ) -> list[Instruction]:
        """Have a member copy, unless it does, or has to catch up by itself."""
        staged = report.staged.get(target.id)
        if staged is not None and staged.state is not Staging.FAILED:
            return []
        if staged is not None:
            self._failed[report.node] = self._failed.get(report.node, 0) + 1
            if self.change.source and self._failed[report.node] > self._timing.fetches_max:
                return [GiveUp(f"{report.node}: {staged.error}")]
        if self._goes_on(report, target.id):
            return []
        source = self._source_for(report.node, reports)
        if source is None:
            return []
        stage = Stage(report.node, target.id, source)
        return [stage] if self._ask(stage, now_s) else []

    def _source_for(self, node: str, reports: Mapping[str, Report]) -> str | None:
        """Whom to copy from: itself when it has the state and that is good, then a follower, then
        the leader."""
        able = [
            r
            for r in reports.values()
            if r.old is not None
            and not r.old.needs_reseed
            and (r.node != node or node not in self.change.fresh)
        ]
        if self.change.source:
            return node
        able.sort(key=lambda r: (r.node != node, bool(r.old and r.old.is_leader), r.node))
        return able[0].node if able else None

    # -- founding ------------------------------------------------------------------------------

    def _found(
        self, reports: Mapping[str, Report], seal: tuple[int, int], now_s: float
    ) -> list[Instruction]:
        assert self._sealed_s is not None
        waited_s = now_s - self._sealed_s
        todo: list[Instruction] = []
        complete, enough, possible = True, True, True
        for target in self.change.targets:
            have = 0
            for member in target.members:
                report = reports.get(member)
                if report is not None and self._has_final(report, target, seal):
                    have += 1
                else:
                    complete = False
                    if report is not None:
                        todo += self._stage(report, target, reports, now_s)
            if 2 * have <= len(target.members):
                enough = False
                if 2 * sum(m in reports for m in target.members) <= len(target.members):
                    possible = False
        if complete or (enough and waited_s >= self._timing.straggler_s):
            return [Found(self._base(reports, seal))]
        wait_s = self._timing.redirect_s * (1 if not possible else 5)
        if not enough and waited_s >= wait_s and self.change.is_split:
            # The whole has its final state on its members' disks: it is founded anew from that,
            # as after any seal without a change (healing).
            return [GiveUp("its parts were not ready in time after the seal")]
        if not enough and waited_s >= wait_s:
            redirect = Redirect(self.change.old_members)
            if set(self.change.targets[0].members) != set(redirect.members) or self.change.fresh:
                return [redirect] if self._ask(redirect, now_s) else []
        return todo

    def _base(self, reports: Mapping[str, Report], seal: tuple[int, int]) -> Base:
        """Where the next log begins. Never before what it continues (tokens only grow), and past
        what was restored, so that the state says by its index whether it was rebased."""
        if not self.change.source:
            return Base(*seal)
        restored = [s.applied_index for r in reports.values() for s in r.staged.values()]
        return Base(max(seal[0], *restored) + 1, seal[1])

    def _has_final(self, report: Report, target: ShardInfo, seal: tuple[int, int]) -> bool:
        """Whether a member has the final state, on disk."""
        if self._goes_on(report, target.id):
            old = report.old
            return old is not None and old.seal == seal and old.durable_index >= seal[0]
        staged: StagedReplica | None = report.staged.get(target.id)
        return (
            staged is not None
            and staged.state is Staging.COMPLETE
            and (bool(self.change.source) or staged.seal == seal)
            and staged.durable_index >= (0 if self.change.source else seal[0])
        )

    def _seal_of(self, reports: Mapping[str, Report]) -> tuple[int, int] | None:
        """Where the old epoch ended, as soon as anybody has applied its seal."""
        for report in reports.values():
            if report.old is not None and report.old.seal is not None:
                return report.old.seal
            for staged in report.staged.values():
                if staged.seal is not None and not self.change.source:
                    return staged.seal
        return None

    # -- finishing -----------------------------------------------------------------------------

    def _finish(self, reports: Mapping[str, Report], now_s: float) -> list[Instruction]:
        if self._founded_s is None:
            self._founded_s = now_s
        for target in self.change.targets:
            serving = begun = 0
            for member in target.members:
                report = reports.get(member)
                new = None if report is None else report.new.get(target.id)
                if new is not None:
                    serving += 1
                    begun += new.has_begun
                elif not self._is_missing(member, now_s) and self._may_come(report, target, now_s):
                    return []
            if 2 * serving <= len(target.members) or 2 * begun <= len(target.members):
                return []
        return [Finish()]

    def _may_come(self, report: Report | None, target: ShardInfo, now_s: float) -> bool:
        """Whether a member that does not serve yet is waited for. Not for ever: a disk that was
        lost since has this epoch closed to it, and what is amiss is mended by another change."""
        assert self._founded_s is not None
        staged = None if report is None else report.staged.get(target.id)
        if staged is not None and staged.state is not Staging.FAILED:
            return True
        return now_s - self._founded_s <= self._timing.missing_s

    # -- inside --------------------------------------------------------------------------------

    def _goes_on(self, report: Report, shard: str) -> bool:
        """Whether a member goes on with its replica. One that has lost it since the change began,
        or fell too far behind, copies as a new member does: nobody else could mend it meanwhile."""
        old = report.old
        return (
            old is not None
            and not old.needs_reseed
            and self.change.keeps_its_state(report.node, shard)
        )

    def _is_missing(self, node: str, now_s: float) -> bool:
        return now_s - self._heard_s.get(node, self._began_s) > self._timing.missing_s

    def _ask(self, instruction: Instruction, now_s: float) -> bool:
        """Whether to give an instruction now: not more often than once a `retry_s`."""
        if now_s - self._asked_s.get(instruction, float("-inf")) < self._timing.retry_s:
            return False
        self._asked_s[instruction] = now_s
        return True
