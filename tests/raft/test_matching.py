"""What a follower does with an append, for every pair of logs that Raft can produce."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.frames import pack_terms
from agentmem_cluster.raft.matching import Accepted, CommittedConflict, Refused, reconcile


class Log:
    """Terms and commands by index, from 1 on."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.first_index = 1

    @property
    def last_index(self) -> int:
        return len(self.entries)

    def term_at(self, index: int) -> int:
        return self.entries[index - 1].term if index else 0


@dataclass
class Pair:
    leader: Log
    follower: Log
    common: int
    commit: int  # of the follower: never above what both have


def entries_of(terms: list[int], whose: bytes, first: int = 1) -> list[Entry]:
    return [Entry(at, term, whose + b"%d/%d" % (at, term)) for at, term in enumerate(terms, first)]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Logs that agree up to some index; beyond it no term of one is in the other (log matching)."""
    steps = st.lists(st.integers(0, 2), max_size=12)
    common: list[int] = []
    for step in draw(steps):
        common.append((common[-1] if common else 1) + step)
    top = common[-1] if common else 0
    tails: list[list[int]] = []
    for odd in (1, 0):  # terms of the two tails never meet
        term, tail = top + 1, []
        for step in draw(steps):
            term += step
            tail.append(2 * term + odd)
        tails.append(tail)
    shared = entries_of(common, b"both")
    leader = shared + entries_of(tails[0], b"leader", len(shared) + 1)
    follower = shared + entries_of(tails[1], b"follower", len(shared) + 1)
    return Pair(Log(leader), Log(follower), len(shared), commit=draw(st.integers(0, len(shared))))


@given(pairs(), st.data())
def test_an_append_leaves_what_matches_and_ends_in_agreement(
    pair: Pair, data: st.DataObject
) -> None:
    leader, follower = pair.leader, pair.follower
    previous = data.draw(st.integers(0, leader.last_index))
    last = data.draw(st.integers(previous, leader.last_index))
    sent = leader.entries[previous:last]
    verdict = reconcile(
        follower,
        pair.commit,
        previous,
        leader.term_at(previous),
        pack_terms(sent),
        [entry.command for entry in sent],
    )
    if isinstance(verdict, Refused):
        assert previous > pair.common
        assert pair.commit < verdict.next_index <= previous
        return
    assert isinstance(verdict, Accepted)
    kept = follower.entries
    if verdict.truncate_from is not None:
        assert verdict.truncate_from > pair.common >= pair.commit
        kept = kept[: verdict.truncate_from - 1]
    after = kept + [Entry(index, term, command) for command, index, term in verdict.fresh]
    assert [entry.index for entry in after] == list(range(1, len(after) + 1))
    assert after[: verdict.verified] == leader.entries[: verdict.verified]
    assert verdict.verified >= max(last, pair.commit)
    if last <= pair.common:
        assert after == follower.entries  # nothing new: nothing changes (D1)


@given(pairs())
def test_a_probe_that_follows_the_hints_finds_agreement_in_few_steps(pair: Pair) -> None:
    leader, follower = pair.leader, pair.follower
    previous, steps = leader.last_index, 0
    while True:
        verdict = reconcile(follower, pair.commit, previous, leader.term_at(previous), [], [])
        if isinstance(verdict, Accepted):
            break
        assert verdict.next_index - 1 < previous
        previous, steps = verdict.next_index - 1, steps + 1
    terms = {entry.term for entry in follower.entries[pair.common :]}
    assert steps <= len(terms) + 2  # a whole term of the follower at a time


@given(st.integers(1, 20), st.data())
def test_a_leader_that_contradicts_a_committed_entry_is_not_believed(
    size: int, data: st.DataObject
) -> None:
    log = Log(entries_of([1] * size, b"x"))
    commit = data.draw(st.integers(1, size))
    with pytest.raises(CommittedConflict):
        reconcile(log, commit, commit, 2, [[2, 1]], [b"y"])
