"""D9, D13: membership, stale leaders and disruptive ones."""

from __future__ import annotations

from types import SimpleNamespace

from pysyncobj.node import Node


def test_d09_released_runs_two_membership_changes_at_once(released: SimpleNamespace) -> None:
    cluster = released.cluster("ABC", dynamicMembershipChange=True)
    cluster.elect("A")
    cluster.cuts = {("A", "B"), ("A", "C")}  # nothing more can commit
    committed = cluster["A"].raftCommitIndex
    cluster["A"].addNodeToCluster(Node("D"))
    cluster["A"].addNodeToCluster(Node("E"))
    cluster["A"].doTick()
    assert cluster["A"].raftCommitIndex == committed
    assert {node.id for node in cluster["A"].otherNodes} == {"B", "C", "D", "E"}


def test_d13_released_a_cut_off_leader_serves_stale_reads_for_half_a_minute(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    cluster.cuts = {(x, y) for x in "ABC" for y in "ABC" if "A" in (x, y) and x != y}
    cluster.queues.clear()
    cluster.elect("B", live="BC")
    cluster["B"].put("new")
    for _ in range(10):
        cluster.round("BC")
    assert cluster["B"].applied == ["new"]
    cluster.clock.now_s += 25
    cluster["A"].doTick()
    assert cluster["A"]._isLeader()
    assert cluster["A"].applied == []


def test_d13_released_a_node_that_was_cut_off_forces_elections_when_it_comes_back(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    term = cluster["A"].raftCurrentTerm
    cluster.cuts = {(x, y) for x in "ABC" for y in "ABC" if "C" in (x, y) and x != y}
    for _ in range(30):
        cluster.clock.now_s += 1.0
        cluster["C"].doTick()
        cluster.round("AB")
    assert cluster["C"].raftCurrentTerm >= term + 5
    cluster.cuts = set()
    cluster.queues.clear()
    for _ in range(30):  # a healthy cluster, and time for C to lose its patience
        cluster.round(advance_s=0.1)
    assert cluster["A"].raftCurrentTerm > term
