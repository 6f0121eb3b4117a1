"""What is done next about a change, in tables: reports in, instructions out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentmem_cluster.epochs.change import Base, Change
from agentmem_cluster.epochs.conductor import (
    Checkpoint,
    Conductor,
    Finish,
    Found,
    GiveUp,
    Redirect,
    SealOld,
    Stage,
    Timing,
)
from agentmem_cluster.epochs.reports import (
    NewReplica,
    OldReplica,
    Report,
    StagedReplica,
    Staging,
)
from agentmem_cluster.shardmap import ShardInfo

OLD = ("n1", "n2", "n3")
TARGET = ShardInfo("s00", 2, ("n2", "n3", "n4"), "n4", 0, 16_384)
MOVE = Change("c1", "s00", 1, OLD, (TARGET,))
SEAL = (100, 7)


def old(
    node: str, applied: int = 100, durable: int = 100, *, leads: bool = False, seal: bool = False
) -> Report:
    return Report(node, OldReplica(applied, durable, is_leader=leads, seal=SEAL if seal else None))


def copy(state: Staging, applied: int = 100, durable: int = 100, *, seal: bool = False) -> Report:
    staged = StagedReplica(state, applied, durable, SEAL if seal else None)
    return Report("n4", None, {"s00": staged})


def step(conductor: Conductor, reports: list[Report], now_s: float, change: Change = MOVE):  # type: ignore[no-untyped-def]
    return conductor.step(change, {report.node: report for report in reports}, now_s)


def test_a_move_copies_follows_checkpoints_seals_founds_and_finishes() -> None:
    conductor = Conductor(MOVE, 0.0)
    members = [old("n1", leads=True), old("n2"), old("n3")]
    # A follower is copied from, not the leader.
    assert step(conductor, [*members, Report("n4")], 0.0) == [Stage("n4", "s00", "n2")]
    assert step(conductor, [*members, copy(Staging.COPYING, 0, 0)], 0.1) == []
    behind = [old("n1", 900, leads=True), old("n2", 900), old("n3", 900)]
    assert step(conductor, [*behind, copy(Staging.FOLLOWING)], 0.2) == []
    near = [old("n1", 900, leads=True), old("n2", 899), old("n3", 899)]
    assert step(conductor, [*near, copy(Staging.FOLLOWING, 890)], 0.3) == [
        Checkpoint("n2"),
        Checkpoint("n3"),
    ]
    flushed = [old("n1", 950, leads=True), old("n2", 950, 899), old("n3", 950, 899)]
    assert step(conductor, [*flushed, copy(Staging.FOLLOWING, 940)], 0.4) == [SealOld("n1")]
    sealed = [old("n1", seal=True, leads=True), old("n2", seal=True), old("n3", seal=True)]
    assert step(conductor, [*sealed, copy(Staging.FOLLOWING)], 0.5) == []
    final = copy(Staging.COMPLETE, seal=True)
    assert step(conductor, [*sealed, final], 0.6) == [Found(Base(*SEAL))]
    founded = MOVE.founded(Base(*SEAL))
    serving = [Report(n, new={"s00": NewReplica(101, has_begun=True)}) for n in TARGET.members]
    assert step(conductor, serving[:2], 0.7, founded) == []
    assert step(conductor, serving, 0.8, founded) == [Finish()]


def test_nothing_is_sealed_while_a_new_member_is_not_ready() -> None:
    conductor = Conductor(MOVE, 0.0)
    members = [old("n1", leads=True), old("n2"), old("n3")]
    for number in range(50):
        steps = step(conductor, [*members, copy(Staging.COPYING, 0, 0)], number / 10)
        assert not any(isinstance(one, SealOld | Found) for one in steps)


def test_a_failed_copy_is_begun_again_but_not_in_a_hurry() -> None:
    conductor = Conductor(MOVE, 0.0)
    members = [old("n1", leads=True), old("n2"), old("n3")]
    begun = sum(
        len(step(conductor, [*members, copy(Staging.FAILED)], number / 100))
        for number in range(300)
    )
    assert begun == 3


def test_a_member_that_stays_away_does_not_hold_up_the_others() -> None:
    conductor = Conductor(MOVE, 0.0, Timing(missing_s=5.0))
    present = [old("n1", leads=True), old("n2"), copy(Staging.FOLLOWING)]
    assert step(conductor, present, 1.0) == []
    assert step(conductor, present, 6.0) == [SealOld("n1")]


@pytest.mark.parametrize("after_s", [0.0, 0.1])
def test_after_the_seal_stragglers_get_only_a_moment(after_s: float) -> None:
    conductor = Conductor(MOVE, 0.0)
    sealed = [old("n1", seal=True, leads=True), old("n2", seal=True), old("n3", 90)]
    present = [*sealed, copy(Staging.COMPLETE, seal=True)]
    assert step(conductor, present, 10.0) == []
    assert step(conductor, present, 10.0 + after_s) == []
    assert step(conductor, present, 10.3) == [Found(Base(*SEAL))]


def test_the_final_state_must_be_on_a_majority_of_disks() -> None:
    conductor = Conductor(MOVE, 0.0)
    sealed = [
        old("n1", seal=True),
        old("n2", durable=99, seal=True),
        old("n3", durable=0, seal=True),
    ]
    for now_s in (0.0, 0.3, 1.0):
        assert step(conductor, [*sealed, copy(Staging.COMPLETE, seal=True)], now_s) == []


def test_when_the_new_members_do_not_come_the_old_ones_are_taken_again() -> None:
    elsewhere = replace(TARGET, members=("n4", "n5", "n6"), preferred_leader="n4")
    change = replace(MOVE, targets=(elsewhere,))
    conductor = Conductor(change, 0.0)
    sealed = [old(n, seal=True) for n in OLD]
    assert step(conductor, sealed, 0.0, change) == []
    assert step(conductor, sealed, 2.5, change) == [Redirect(OLD)]
    back = replace(change, targets=(replace(elsewhere, members=OLD, preferred_leader="n1"),))
    assert step(conductor, sealed, 2.6, back) == [Found(Base(*SEAL))]


def test_another_leader_of_the_meta_group_goes_on_from_reports_alone() -> None:
    sealed = [old(n, seal=True) for n in OLD]
    final = copy(Staging.COMPLETE, seal=True)
    assert step(Conductor(MOVE, 50.0), [*sealed, final], 50.0) == [Found(Base(*SEAL))]


def test_a_lost_replica_is_copied_though_its_node_was_a_member() -> None:
    same = replace(TARGET, members=OLD, preferred_leader="n1")
    change = replace(MOVE, targets=(same,), fresh=("n3",))
    conductor = Conductor(change, 0.0)
    members = [old("n1", leads=True), old("n2"), Report("n3")]
    assert step(conductor, members, 0.0, change) == [Stage("n3", "s00", "n2")]


def test_what_a_backup_cannot_give_is_given_up_before_anything_is_sealed() -> None:
    same = replace(TARGET, members=OLD, preferred_leader="n1")
    change = replace(MOVE, targets=(same,), source="a backup")
    conductor = Conductor(change, 0.0)
    failed = {"s00": StagedReplica(Staging.FAILED, error="a chunk is damaged")}
    members = [Report(n, OldReplica(9, 9, is_leader=n == "n1"), failed) for n in OLD]
    told = [step(conductor, members, number / 10, change) for number in range(40)]
    assert not any(isinstance(one, SealOld) for steps in told for one in steps)
    assert GiveUp("n1: a chunk is damaged") in told[-1]


def test_who_is_to_copy_anew_does_not_copy_from_itself() -> None:
    target = ShardInfo("s00", 2, OLD, "n1", 0, 16_384)
    anew = Change("c1", "s00", 1, OLD, (target,), fresh=("n3",))
    members = [old("n1", leads=True), old("n2"), old("n3")]
    assert step(Conductor(anew, 0.0), members, 0.0, anew) == [Stage("n3", "s00", "n2")]


def test_a_report_crosses_the_link_unchanged() -> None:
    for report in (old("n1", seal=True), copy(Staging.COMPLETE, seal=True), Report("n4")):
        assert Report.from_wire(report.node, report.to_wire()) == report


@pytest.mark.parametrize(
    "useless", [None, OldReplica(10, 10, needs_reseed=True)], ids=["lost", "too far behind"]
)
def test_a_member_whose_replica_is_lost_during_the_change_copies_as_a_new_one_does(
    useless: OldReplica | None,
) -> None:
    conductor = Conductor(MOVE, 0.0)
    others = [old("n1", leads=True), old("n2"), copy(Staging.FOLLOWING)]
    lost = Report("n3", useless)
    assert step(conductor, [*others, lost], 0.0) == [Stage("n3", "s00", "n2")]
    again = replace(lost, staged={"s00": StagedReplica(Staging.FOLLOWING, 100, 100)})
    assert step(conductor, [*others, again], 0.1) == [SealOld("n1")]
    sealed = [
        old("n1", seal=True, leads=True),
        replace(lost, staged={"s00": StagedReplica(Staging.COMPLETE, 100, 100, SEAL)}),
        copy(Staging.COMPLETE, seal=True),
    ]
    assert Found(Base(*SEAL)) in step(conductor, sealed, 0.2) + step(conductor, sealed, 0.5)


def test_a_member_that_cannot_serve_the_next_epoch_is_not_waited_for_for_ever() -> None:
    founded = MOVE.founded(Base(*SEAL))
    conductor = Conductor(founded, 0.0)
    serving = [Report(n, new={"s00": NewReplica(101, has_begun=True)}) for n in ("n2", "n3")]
    patience_s = Timing().missing_s
    assert step(conductor, [*serving, Report("n4")], 0.0, founded) == []
    assert step(conductor, [*serving, Report("n4")], patience_s, founded) == []
    # Another copies still, however long it takes ...
    copying = copy(Staging.COPYING)
    assert step(conductor, [*serving, copying], patience_s + 1.0, founded) == []
    # ... but this one lost its disk, and no copy helps it into an epoch in which it has voted.
    assert step(conductor, [*serving, Report("n4")], patience_s + 1.0, founded) == [Finish()]


def test_a_member_that_lost_its_replica_before_a_move_counts_with_the_copy_it_made() -> None:
    """The move was wished before anybody noticed the loss, so the change does not name it."""

    def lost(state: Staging, *, seal: bool = False) -> Report:
        staged = StagedReplica(state, 100, 100, SEAL if seal else None)
        return Report("n2", None, {"s00": staged})

    conductor = Conductor(MOVE, 0.0)
    others = [old("n1", leads=True), old("n3")]
    moved = copy(Staging.FOLLOWING)
    assert step(conductor, [*others, Report("n2"), moved], 0.0) == [Stage("n2", "s00", "n3")]
    assert step(conductor, [*others, lost(Staging.COPYING), moved], 0.1) == []
    assert step(conductor, [*others, lost(Staging.FOLLOWING), moved], 0.2) == [SealOld("n1")]
    sealed = [old("n1", leads=True, seal=True), old("n3", seal=True)]
    # n3 alone has the final state: n2 and n4 are yet to have it.
    behind = [*sealed, lost(Staging.FOLLOWING), copy(Staging.FOLLOWING)]
    assert step(conductor, behind, 0.3) == []
    done = [*sealed, lost(Staging.COMPLETE, seal=True), copy(Staging.COMPLETE, seal=True)]
    assert step(conductor, done, 0.4) == [Found(Base(*SEAL))]


def test_a_split_whose_parts_do_not_come_after_the_seal_is_given_up() -> None:
    """Else nobody could write for as long as, say, the disks have no room for the parts."""
    parts = (
        ShardInfo("s00", 2, OLD, "n1", 0, 8_192),
        ShardInfo("s01", 2, OLD, "n1", 8_192, 16_384),
    )
    split = Change("c1", "s00", 1, OLD, parts)
    conductor = Conductor(split, 0.0)
    sealed = [old(name, seal=True) for name in OLD]
    timing = Timing()
    assert not any(isinstance(s, GiveUp) for s in step(conductor, sealed, 0.0, split))
    late_s = 5 * timing.redirect_s + 0.1
    assert any(isinstance(s, GiveUp) for s in step(conductor, sealed, late_s, split))
