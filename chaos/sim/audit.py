"""The durable rule, checked where it counts: what a node says must be on its platter already.

The strictest power loss is imagined at the very moment: a copy of the disk that holds what is
durable and nothing else, and a journal recovered from it. Samples do, because recovering a
journal is not free, and what is wrong once is wrong often.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.judge import Judge
from agentmem_cluster.journal.group import GroupLog
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import GroupSpec
from agentmem_cluster.raft.frames import Kind

COMMITTED_EVERY_S = 5.0
COMMITTED_OF_TERM = 1  # the first of each term is audited whatever the time
VOTES_ALL = 10  # audited of a world's first votes, and of all later ones a part
VOTES_SAMPLE = 0.1
APPENDED_SAMPLE = 0.001
# The first acknowledgements of a term are audited, each that says more than the one before, and so
# they are after a log shrank: a flush that was under way when a new leader truncated the log must
# not make the entries durable that replaced those it wrote.
APPENDED_OF_TERM = 2


class Machine(Protocol):
    """What is audited: a disk, and what the state machines have made durable beside it."""

    name: str
    disk: SimDisk
    journal: Journal | None
    groups: dict[str, GroupSpec]  # which it takes part in now

    def durable_index(self, group: str) -> int: ...

    def may_have_lost(self, spec: GroupSpec) -> bool: ...


class Auditor:
    def __init__(
        self,
        machines: Mapping[str, Machine],
        recover: Callable[[SimDisk], Journal],
        judge: Judge,
        chance: random.Random,
        now_s: Callable[[], float],
    ) -> None:
        self._machines = machines
        self._recover = recover
        self._judge = judge
        self._chance = chance
        self._now_s = now_s
        self._next_s = 0.0
        self._votes = 0
        self._committed_of: dict[
            tuple[str, int], tuple[int, int]
        ] = {}  # in which term, how many audited
        self._said: dict[tuple[str, str, int], tuple[int, int]] = {}  # in which term, up to where
        self._recovered: dict[str, tuple[int, Journal]] = {}  # of which version of the disk
        self._closely: dict[tuple[str, str, int], int] = {}
        self.audits = 0

    def committed(self, group: GroupSpec, index: int, term: int) -> None:
        """An entry is applied or acknowledged: a quorum must have it through a power loss of all.

        pysyncobj lets a leader count itself for what it has not synced: then this is where an
        entry that one disk holds is applied by a follower, long before anything is lost.
        """
        where = (group.id, group.epoch)
        known_term, audited = self._committed_of.get(where, (0, 0))
        if term > known_term:
            audited = 0
        if audited < COMMITTED_OF_TERM and term >= known_term:
            self._committed_of[where] = (term, audited + 1)
        elif self._now_s() < self._next_s:
            return
        self._next_s = self._now_s() + self._chance.expovariate(1 / COMMITTED_EVERY_S)
        holders = []
        for name in group.members:
            machine = self._machines[name]
            if machine.durable_index(group.id) >= index or machine.may_have_lost(group):
                holders.append(name)
                continue
            log = self._log(machine, group)
            if log is None:
                return  # accused already
            if log.first_index <= index <= log.last_index and log.term_at(index) == term:
                holders.append(name)
        if len(holders) <= len(group.members) // 2:
            self._judge.accuse(
                "durable rule",
                f"{group.id}/{index} counted as committed when only {holders} of "
                f"{list(group.members)} would have kept it through a power loss",
            )

    def speaks(self, machine: Machine, peer: str, frames: list[Any]) -> None:
        """Frames are leaving: votes and acknowledged entries in them must be on the platter."""
        for frame in frames:
            kind, group, term = frame[0], machine.groups.get(frame[1]), frame[4]
            if group is None or group.epoch != frame[2]:
                continue  # it has left that epoch while this waited, and perhaps forgotten its log
            if kind in (Kind.VOTE, Kind.ASK_VOTE):
                self._votes += 1
                if self._votes <= VOTES_ALL or self._chance.random() < VOTES_SAMPLE:
                    candidate = peer if kind == Kind.VOTE else machine.name
                    self._voted(machine, group, term, candidate)
            elif kind == Kind.APPENDED and self._is_sampled(machine.name, group, term, frame[6]):
                self._has_entries(machine, group, term, frame[6])

    def _is_sampled(self, name: str, group: GroupSpec, term: int, index: int) -> bool:
        where = (name, group.id, group.epoch)
        said_term, said_index = self._said.get(where, (0, 0))
        self._said[where] = (term, index)
        says_more = index > said_index
        if term != said_term or index < said_index:
            self._closely[where] = APPENDED_OF_TERM
            says_more = index > 0
        if says_more and self._closely.get(where, 0) > 0:
            self._closely[where] -= 1
            return True
        return self._chance.random() < APPENDED_SAMPLE

    def _voted(self, machine: Machine, group: GroupSpec, term: int, candidate: str) -> None:
        log = self._log(machine, group)
        if log is not None and (log.term, log.vote) != (term, candidate) and log.term <= term:
            self._judge.accuse(
                "durable rule",
                f"{machine.name} said that it voted for {candidate} in term {term} of {group.id}, "
                f"and its disk says {log.vote} in term {log.term}",
            )

    def _has_entries(self, machine: Machine, group: GroupSpec, term: int, index: int) -> None:
        log = self._log(machine, group)
        if log is None or machine.journal is None:
            return
        cached = machine.journal.group(group.id, group.epoch)
        if max(log.term, cached.term) > term:
            return  # a later leader may have had them truncated since the frame was written
        if log.last_index < index:
            self._judge.accuse(
                "durable rule",
                f"{machine.name} said that it has {group.id}/{index}, and its disk ends "
                f"at {log.last_index}",
            )
        elif index >= max(log.first_index, cached.first_index) - 1:
            ours, said = log.term_at(index), cached.term_at(index)
            if ours != said:
                self._judge.accuse(
                    "durable rule",
                    f"{machine.name} said that it has {group.id}/{index} of term {said}, and its "
                    f"disk has one of term {ours} there",
                )

    def _log(self, machine: Machine, group: GroupSpec) -> GroupLog | None:
        self.audits += 1
        own = machine.groups.get(group.id)
        if own is not None and own.epoch == group.epoch:
            group = own  # a member that came late has a log that begins later
        version, recovered = self._recovered.get(machine.name, (-1, None))
        if recovered is not None and version == machine.disk.durable_version:
            return _log_of(recovered, group)  # nothing was synced since
        try:
            journal = self._recover(machine.disk.platter())
        except Exception as error:
            trace = traceback.format_exc()
            self._judge.accuse(
                "recovery", f"after a power loss of {machine.name}: {error}\n{trace}"
            )
            return None
        self._recovered[machine.name] = (machine.disk.durable_version, journal)
        return _log_of(journal, group)


def _log_of(journal: Journal, group: GroupSpec) -> GroupLog:
    return journal.group(group.id, group.epoch, group.base_index, group.base_term)
