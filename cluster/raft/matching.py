"""What a follower does with an append: keep what matches, drop what truly conflicts, nothing else.

Raft 5.3: "if an existing entry conflicts with a new one (same index but different terms), delete
the existing entry and all that follow it". pysyncobj deletes everything after the previous index
whether it conflicts or not, so an append that arrives late takes acknowledged entries out of
the quorum (D1). Here an entry that matches stays, and nothing at or below the commit index goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentmem_cluster.raft.frames import unpack_entries

# How far a follower looks back for the beginning of a term that does not match.
LOOK_BACK_MAX = 100_000


class TermLog(Protocol):
    first_index: int
    last_index: int

    def term_at(self, index: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """The log agrees with the leader's up to `verified` once `fresh` is added after `previous`."""

    previous: int
    fresh: list[tuple[bytes, int, int]]  # command, index, term: pysyncobj's order
    truncate_from: int | None
    verified: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The log does not hold the leader's entry `previous`; `next_index` is worth trying."""

    previous: int
    next_index: int


class CommittedConflict(Exception):
    """A leader contradicts a committed entry: some member has lost its disk or its senses."""


def reconcile(
    log: TermLog,
    commit_index: int,
    previous: int,
    previous_term: int,
    terms: list[list[int]],
    commands: Sequence[bytes],
) -> Accepted | Refused:
    """Decide what an append of the current term's leader changes in this log."""
    last = previous + len(commands)
    if last <= commit_index:
        # Leader completeness: every leader has all that is committed here.
        return Accepted(commit_index, [], None, commit_index)
    if previous >= commit_index:
        if previous > log.last_index:
            return Refused(previous, log.last_index + 1)
        if log.term_at(previous) != previous_term:
            if previous == commit_index:
                raise CommittedConflict(_conflict(previous, log.term_at(previous), previous_term))
            return Refused(previous, _start_of_term(log, commit_index, previous))
    matched = max(previous, commit_index)
    entries = unpack_entries(previous, terms, list(commands))[matched - previous :]
    truncate_from = None
    for at, entry in enumerate(entries):
        if entry.index > log.last_index:
            entries = entries[at:]
            break
        if log.term_at(entry.index) != entry.term:
            truncate_from = entry.index
            entries = entries[at:]
            break
        matched = entry.index
    else:
        entries = []
    return Accepted(matched, [(e.command, e.index, e.term) for e in entries], truncate_from, last)


def _start_of_term(log: TermLog, commit_index: int, index: int) -> int:
    """The first index of the term at `index`: the leader skips a whole term in one step."""
    term = log.term_at(index)
    lowest = max(commit_index, index - LOOK_BACK_MAX)
    while index - 1 > lowest and log.term_at(index - 1) == term:
        index -= 1
    return index


def _conflict(index: int, ours: int, theirs: int) -> str:
    return (
        f"entry {index} is committed here with term {ours}, and the leader has it with term "
        f"{theirs}: a member of the group has lost what it had promised to keep"
    )
