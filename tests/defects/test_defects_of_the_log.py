"""D1, D10, D12: how the released library unsays what it acknowledged, and ours does not."""

from __future__ import annotations

from types import SimpleNamespace

from pysyncobj.node import Node

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
