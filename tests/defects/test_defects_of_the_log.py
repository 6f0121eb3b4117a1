"""D1, D10, D12: how the released library unsays what it acknowledged, and ours does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pysyncobj.node import Node

from agentmem_cluster.raft.api import Applied, Role
from agentmem_cluster.raft.frames import Kind

# -- D1: an old acknowledgement moves the leader back, and the follower deletes what matches --


def test_d01_released_loses_acknowledged_commands_without_any_fault_but_the_leaders_end(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC", appendEntriesUseBatch=False)
    a, b = cluster["A"], cluster["B"]
    cluster.elect("A")
    cluster.queues.clear()
    acknowledged: list[int] = []
    for number in range(6):  # one append each; C is slow and gets none
        a.put(
            number,
            bytes(40_000),
            callback=lambda result, error: acknowledged.append(result) if error == 0 else None,
        )
        a.doTick()
    cluster.deliver("A", "B")
    held_by_b = b.last_index()
    cluster.deliver("B", "A", 2)  # the first answers only: nextIndex goes back
    a._SyncObj__newAppendEntriesTime = 0
    a.doTick()
    cluster.deliver("B", "A")  # the rest: all six commit
    a.doTick()
    assert acknowledged == [0, 1, 2, 3, 4, 5]
    cluster.deliver("A", "B", 1)  # one append that was sent again, then A is gone
    assert b.last_index() < held_by_b, "B deleted entries that match and that it had answered for"

    cluster.queues.clear()
    cluster.elect("B", live="BC")
    for _ in range(5):
        cluster.round("BC")
    assert [number for number in acknowledged if number not in b.applied] != []


def test_d01_ours_keeps_what_matches_and_loses_nothing_in_the_same_schedule(ours: Any) -> None:
    cluster = ours("ABC", append_bytes_max=50_000)
    a, b = cluster["A"], cluster["B"]
    cluster.elect("A")
    outcomes = []
    for number in range(6):  # one append each; C is slow and gets none
        outcomes.append(a.propose(b"%d" % number + bytes(40_000)))
        a.tick()
    cluster.queues["A", "C"].clear()
    first_append = list(cluster.queues["A", "B"][:1])
    cluster.deliver("A", "B")
    b.tick()
    held_by_b = b.log.last_index
    cluster.deliver("B", "A", 2)  # the first answers only
    a.clock.now_s += a.settings.heartbeat_s
    a.tick()
    cluster.deliver("B", "A")
    a.tick()
    assert [type(outcome[0]) for outcome in outcomes] == [Applied] * 6
    cluster.deliver("A", "B")
    b.core.receive("A", first_append)  # and an append that arrives again, late
    b.tick()
    assert b.log.last_index == held_by_b

    cluster.cut_off("A")
    cluster.elect("B", live="BC")
    cluster.settle("BC")
    assert [command[:1] for command in b.machine.commands] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert cluster["C"].machine.commands == b.machine.commands


# -- D10: a snapshot that is still arriving moves the commit index over a log that diverged --


def test_d10_released_a_snapshot_chunk_commits_entries_that_no_quorum_holds(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    cluster.cuts = {("A", "B"), ("A", "C"), ("B", "A"), ("C", "A")}
    for number in range(5):
        cluster["A"].put(f"only A has {number}")
    cluster["A"].doTick()
    cluster["A"].doTick()
    cluster.queues.clear()
    a, committed = cluster["A"], cluster["A"].raftCommitIndex
    chunk = {
        "type": "append_entries",
        "term": a.raftCurrentTerm + 1,
        "commit_index": committed + 50,
        "serialized": (b"first bytes of many", True, False),
    }
    cluster.wires["A"]._onMessageReceived(Node("B"), chunk)
    a.doTick()
    assert [item for item in a.applied if str(item).startswith("only A has")] != []


def test_d10_ours_commits_nothing_beyond_what_its_leader_has_verified(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    cluster.cut_off("A")
    for number in range(5):
        cluster["A"].propose(b"only A has %d" % number)
    cluster["A"].tick()
    cluster.elect("B", live="BC")
    leader_says = [frame for frame in cluster.queues["B", "C"] if frame[0] == Kind.APPEND] or [
        append_of(cluster["B"])
    ]
    far_ahead = leader_says[-1][:]
    far_ahead[7] = 50  # the commit index: of a log that A does not have
    cluster["A"].core.receive("B", [far_ahead])
    cluster["A"].tick()
    a = cluster["A"]
    assert a.status.term == cluster["B"].status.term, "it did listen"
    assert a.machine.commands == []

    cluster.cuts = set()
    cluster.connect("A")
    cluster.settle(rounds=20)
    assert a.machine.entries == cluster["B"].machine.entries


def append_of(leader: Any) -> list[Any]:
    """The append without entries that a leader would send about its last entry."""
    log, status = leader.log, leader.status
    last_term = log.term_at(log.last_index)
    boot = leader.core._boot
    previous = [log.last_index, last_term, status.commit_index, log.last_index, [], []]
    return [int(Kind.APPEND), "g", 1, boot, status.term, *previous]


# -- D12: answers without a term, votes counted twice --


def test_d12_released_counts_the_same_vote_twice(released: SimpleNamespace) -> None:
    cluster = released.cluster("ABCDE")
    a = cluster["A"]
    a._SyncObj__raftElectionDeadline = 0
    a.doTick()
    vote = {"type": "response_vote", "term": a.raftCurrentTerm}
    for _ in range(2):
        cluster.wires["A"]._onMessageReceived(Node("B"), dict(vote))
    assert a._isLeader(), "two of five are enough"


def test_d12_released_takes_an_answer_from_an_earlier_term_for_one_of_its_own(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    a = cluster["A"]
    cluster.elect("A")
    answer = {
        "type": "next_node_idx",
        "next_node_idx": a.last_index() + 4,  # of entries that a later leader overwrote
        "reset": False,
        "success": True,
    }
    cluster.queues.clear()
    acknowledged: list[int] = []
    cluster.cuts = {("A", "B"), ("A", "C")}
    a.put("nobody else has it", callback=lambda result, error: acknowledged.append(error))
    a.doTick()
    cluster.wires["A"]._onMessageReceived(Node("B"), answer)
    a.doTick()
    assert acknowledged == [0]
    assert all("nobody else has it" not in str(cluster[name].log()) for name in "BC")


def frames_of(cluster: Any, sender: str, receiver: str, kind: Kind) -> list[list[Any]]:
    return [frame for frame in cluster.queues[sender, receiver] if frame[0] == kind]


def test_d12_ours_counts_every_voter_once(ours: Any) -> None:
    cluster = ours("ABCDE")
    a = cluster["A"]
    for name in "ABCDE":
        cluster[name].clock.now_s += 2.0
    a.tick()
    for name in "BCDE":
        cluster.deliver("A", name)
        cluster[name].tick()
        cluster.deliver(name, "A")
    a.tick()
    assert a.status.role is Role.CANDIDATE
    cluster.deliver("A", "B")
    cluster["B"].tick()
    votes = frames_of(cluster, "B", "A", Kind.VOTE)
    assert len(votes) == 1
    a.core.receive("B", votes * 5)
    a.tick()
    assert a.status.role is Role.CANDIDATE


def test_d12_ours_takes_no_answer_from_another_term_or_another_life(ours: Any) -> None:
    cluster = ours("ABC")
    a, b = cluster["A"], cluster["B"]
    cluster.elect("A")
    cluster.settle()
    outcome = a.propose(b"nobody else has it")
    a.tick()
    cluster.queues.clear()
    index = a.log.last_index
    boot, term = a.core._boot, a.status.term

    def answer(of_term: int, to_boot: bytes) -> list[Any]:
        return [int(Kind.APPENDED), "g", 1, b.core._boot, of_term, to_boot, index]

    a.core.receive("B", [answer(term - 1, boot), answer(term, b"anotherA")])
    a.tick()
    assert a.status.commit_index < index
    assert outcome == []
    assert a.core.counters["frames_strange"] == 2
    a.core.receive("B", [answer(term, boot)])
    a.tick()
    assert a.status.commit_index == index, "the same answer, in its own term and life, counts"


def test_d12_ours_frames_of_another_epoch_are_strangers(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    stranger = append_of(cluster["A"])
    stranger[2] = 2
    before = cluster["B"].status
    cluster["B"].core.receive("A", [stranger])
    cluster["B"].tick()
    assert cluster["B"].core.counters["frames_strange"] == 1
    assert cluster["B"].status == before
