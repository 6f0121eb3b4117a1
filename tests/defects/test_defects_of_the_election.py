"""D9, D13: membership, stale leaders and disruptive ones."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from pysyncobj.node import Node

from agentmem_cluster.errors import NoQuorum, NotLeader
from agentmem_cluster.raft.api import Applied, GroupSpec
from agentmem_cluster.raft.frames import Kind


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


def test_d09_ours_a_group_has_the_members_it_was_founded_with(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    a = cluster["A"]
    with pytest.raises(AttributeError):
        a.status.members += ("D",)
    with pytest.raises(ValueError, match="served here already"):
        a.core.add_group(GroupSpec("g", 1, ("A", "B", "C", "D")), a.machine)
    # What pysyncobj would take for a change of members is a command like any other.
    outcome = a.propose(b"\x02" + pickle.dumps(["add", "D"]))
    cluster.settle()
    assert isinstance(outcome[0], Applied)
    assert a.status.members == ("A", "B", "C")
    # And whoever is no member is not heard.
    a.core.peer_up("D", 1)
    a.core.receive("D", [[int(Kind.ASK_VOTE), "g", 1, b"somebody", 99, 99, 99, True]])
    a.tick()
    assert a.is_leader and a.core.counters["frames_strange"] == 1


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


def test_d13_ours_a_cut_off_leader_steps_down_within_an_election_timeout_and_refuses_reads(
    ours: Any,
) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    a = cluster["A"]
    cluster.cut_off("A")
    cluster.elect("B", live="BC")
    cluster["B"].propose(b"new")
    cluster.settle("BC")
    assert cluster["B"].machine.commands == [b"new"]
    stale = a.read_index()
    waited_s = 0.0
    while a.is_leader or not stale:
        a.clock.now_s += 0.05
        waited_s += 0.05
        a.tick()
        assert waited_s <= a.settings.election_s_max + a.settings.heartbeat_s + 0.1
    assert isinstance(stale[0], NoQuorum)
    refused = a.propose(b"too late")
    assert isinstance(refused[0], NotLeader)


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


def test_d13_ours_a_node_that_was_cut_off_disturbs_nobody_when_it_comes_back(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    term = cluster["A"].status.term
    cluster.cut_off("C")
    for _ in range(30):
        cluster["C"].clock.now_s += 1.0
        cluster["C"].tick()
        for _ in range(10):
            cluster.round("AB", advance_s=0.1)
    assert cluster["C"].status.term == term
    cluster.cuts = set()
    cluster.connect("C")
    outcome = cluster["A"].propose(b"undisturbed")
    cluster.settle(rounds=60, advance_s=0.05)
    assert isinstance(outcome[0], Applied)
    assert cluster["A"].is_leader and cluster["A"].status.term == term
    assert cluster["C"].machine.commands == [b"undisturbed"]
