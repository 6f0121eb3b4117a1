"""Each cheap invariant accuses what it is there for, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import Call
from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.epochs import EpochJudge
from agentmem_chaos.sim.invariants import Invariants
from agentmem_chaos.sim.judge import Judge
from agentmem_chaos.sim.places import Places
from agentmem_chaos.sim.recency import Recency
from agentmem_chaos.sim.schedule import Schedule, stream
from agentmem_chaos.sim.story import Story
from agentmem_cluster.epochs.change import Base, Phase
from agentmem_cluster.epochs.change import Change as EpochChange
from agentmem_cluster.journal.group import GroupLog
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry, GroupStatus, Role
from agentmem_cluster.shardmap import ShardInfo

STATUS = GroupStatus(
    id="meta",
    epoch=1,
    members=("n1", "n2", "n3"),
    role=Role.FOLLOWER,
    term=2,
    leader="n1",
    last_index=5,
    commit_index=4,
    applied_index=3,
    durable_index=5,
    first_index=1,
    match_index={},
    queued=0,
)


def a_judge() -> Judge:
    return Judge(Story(keep=False), Schedule())


def a_log(*terms: int) -> GroupLog:
    """A log whose entries have these terms."""
    journal = Journal.open(SimDisk(stream(1, "disk")), "journal")
    log = journal.group("meta", 1)
    for index, term in enumerate(terms, 1):
        log.append([Entry(index, term, b"x")])
    return log


Change = Callable[[GroupStatus], GroupStatus]
CHANGES: dict[str, Change] = {
    "applied before it is committed": lambda s: dataclasses.replace(s, applied_index=5),
    "committed beyond the log": lambda s: dataclasses.replace(s, commit_index=6),
    "applied before it is synced": lambda s: dataclasses.replace(s, durable_index=2),
    "compacted beyond what is durable": lambda s: dataclasses.replace(s, first_index=3),
    "a term that went back": lambda s: dataclasses.replace(s, term=1),
    "a commit that went back": lambda s: dataclasses.replace(s, commit_index=3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_indexes_out_of_order_are_accused(change: Change) -> None:
    judge = a_judge()
    invariants = Invariants(judge)
    log = a_log(1, 1, 2, 2, 2)
    invariants.turned("n1", 1, STATUS, log, 1)
    assert judge.violations == []
    invariants.turned("n1", 1, change(STATUS), log, 1)
    assert {violation.rule for violation in judge.violations} == {"order of indexes"}


def test_another_life_of_a_node_may_begin_with_less() -> None:
    judge = a_judge()
    invariants = Invariants(judge)
    log = a_log(1, 1, 2, 2, 2)
    invariants.turned("n1", 1, STATUS, log, 1)
    invariants.turned("n1", 2, dataclasses.replace(STATUS, commit_index=1, applied_index=1), log, 1)
    assert judge.violations == []


def test_two_committed_entries_at_one_index_are_accused() -> None:
    judge = a_judge()
    invariants = Invariants(judge)
    invariants.turned("n1", 1, STATUS, a_log(1, 1, 2, 2, 2), 1)
    invariants.turned("n2", 1, STATUS, a_log(1, 1, 1, 1, 2), 1)
    assert [violation.rule for violation in judge.violations] == ["state machine safety"]


def test_a_leader_without_a_committed_entry_is_accused_unless_it_was_elected_before() -> None:
    judge = a_judge()
    invariants = Invariants(judge)
    invariants.turned("n1", 1, STATUS, a_log(1, 1, 2, 2, 2), 1)
    short = a_log(1, 1, 2)
    invariants.elected("n2", STATUS, short)  # of the very term: told late
    assert judge.violations == []
    invariants.elected("n2", dataclasses.replace(STATUS, term=3), short)
    assert [violation.rule for violation in judge.violations] == ["leader completeness"]


def a_call(kind: Kind, index: int) -> Call:
    return Call(1, "meta", "k0", kind, "c1-1", 0.0, shard="meta", index=index)


def test_a_read_that_shows_less_than_was_answered_before_it_is_stale() -> None:
    judge = a_judge()
    recency = Recency(judge)
    recency.answered(a_call(Kind.WRITE, 7), {})
    seen = recency.seen()
    recency.answered(a_call(Kind.READ, 7), seen)
    recency.answered(a_call(Kind.READ, 6), {"meta": 5})  # it was asked for before
    assert judge.violations == []
    recency.answered(a_call(Kind.READ, 6), seen)
    assert [violation.rule for violation in judge.violations] == ["stale reads"]


@dataclasses.dataclass
class AMachine:
    name: str
    has: int  # the last entry of s00 that its disk would keep
    had: int  # and that the disks had which it lost
    incarnation: str = "one"

    @property
    def disk(self) -> SimDisk:
        return SimDisk(stream(1, self.name))

    @property
    def lost_index(self) -> dict[str, int]:
        return {"s00": self.had}

    def durable_index(self, group: str) -> int:
        return self.has


@pytest.mark.parametrize(
    ("second", "is_accused"),
    [((71, 0), False), ((70, 0), True), ((0, 71), False), ((0, 70), True)],
    ids=["has it", "has less", "had it on a disk that is lost", "had less"],
)
def test_an_epoch_is_founded_on_a_majority_that_has_its_base_or_had_it(
    second: tuple[int, int], is_accused: bool
) -> None:
    judge = a_judge()
    machines = [AMachine("n1", 71, 0), AMachine("n2", *second), AMachine("n3", 0, 0)]
    by_name = {machine.name: machine for machine in machines}
    epochs = EpochJudge(by_name, judge, Schedule(), Places(["s00"]))
    members = ("n1", "n2", "n3")
    target = ShardInfo("s00", 2, members, "n1", 0, 16_384)

    epochs.founded(EpochChange("c1", "s00", 1, members, (target,), Phase.FOUNDED, base=Base(71, 3)))

    assert [v.rule for v in judge.violations] == ["founded on a majority"] * is_accused
