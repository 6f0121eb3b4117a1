"""The invariants. Every one is checked while the world runs, or over its history at the end.

- election safety: at most one leader per group, epoch and term;
- state machine safety: one entry per index, the same on every replica, in order, without gaps;
- equal digests at equal applied index;
- exactly once: a request takes effect at one index at most, and always at the same one;
- durable rule (`audit`): what a node says is on its platter, what is acknowledged on a quorum's;
- an acknowledged write is there at the end, with the result that was answered;
- a write that was refused is not there;
- every history is linearizable (writes, cas, adds, reads on any replica);
- no read is older than what was answered before it (`recency`);
- a node's indexes are in order after every turn, and a leader has what is committed (`invariants`);
- liveness: after healing, writes succeed, replicas meet, reads answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgpack

from agentmem_chaos.checker import UNKNOWN_RETURN, Kind, Operation, Verdict, check
from agentmem_chaos.sim import shard_machine
from agentmem_chaos.sim.clients import Call, Fate
from agentmem_chaos.sim.machine import Command, Effect, Outcome
from agentmem_chaos.sim.rewinds import EffectAt
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.story import Story
from agentmem_cluster.epochs.commands import decode, is_control
from agentmem_cluster.raft.api import Applied, Entry

FOUND_MAX = 20
Ledger = Callable[[str], Outcome | None]  # of a request


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    at_s: float
    what: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.at_s:.4f} s: {self.what}"


@dataclass(slots=True)
class _AppliedEntry:
    term: int
    command: bytes
    digest: bytes | None  # of who was first to have one here: a batch has it at its end only
    first_node: str


class Judge:
    def __init__(self, story: Story, schedule: Schedule) -> None:
        self._story = story
        self._schedule = schedule
        self.violations: list[Violation] = []
        self.acknowledged = 0
        self.checker_steps = 0
        self._applied: dict[tuple[str, int], _AppliedEntry] = {}
        self._next_index: dict[tuple[str, str], int] = {}  # of a node's replica
        self._effects: dict[tuple[str, str], list[EffectAt]] = {}  # by group and request
        self._undone: set[EffectAt] = set()
        self._leader_of: dict[tuple[str, int, int], str] = {}
        # Of which group a shard is all, or a part: a request takes effect once in all of them.
        self.group_of: Callable[[str], str] = lambda shard: shard
        self.elections = 0

    def accuse(self, rule: str, what: str) -> None:
        if len(self.violations) < FOUND_MAX:
            violation = Violation(rule, self._schedule.now_s, what)
            self.violations.append(violation)
            self._story.tell(violation.at_s, "", f"VIOLATION of {rule}: {what}")
        self._schedule.stop()

    # -- while the world runs --

    def booted(self, node: str, replica: str, applied_index: int) -> None:
        self._next_index[node, replica] = applied_index + 1

    def applied(
        self,
        node: str,
        replica: str,
        group: str,
        entry: Entry,
        effect: Effect,
        digest: bytes | None,
    ) -> bool:
        """A replica applied an entry. True when it is the first to apply this one.

        Indexes go on from one epoch to the next, so an entry of the new one stands where none of
        the old one took effect: what followed the seal there was not applied.
        """
        expected = self._next_index[node, replica]
        if entry.index != expected:
            self.accuse("gapless apply", f"{node} applied {group}/{entry.index}, not {expected}")
        self._next_index[node, replica] = entry.index + 1
        here = _AppliedEntry(entry.term, entry.command, digest, node)
        first = self._applied.setdefault((group, entry.index), here)
        if first is not here:
            if (first.term, first.command) != (entry.term, entry.command):
                self.accuse(
                    "state machine safety",
                    f"at {group}/{entry.index} {first.first_node} applied "
                    f"{describe(first.command)} of term {first.term}, {node} "
                    f"{describe(entry.command)} of term {entry.term}",
                )
            elif first.digest is None:
                first.digest = digest
            elif digest is not None and first.digest != digest:
                self.accuse(
                    "equal digests",
                    f"{first.first_node} and {node} differ after {group}/{entry.index}",
                )
        if effect.fresh:
            self._took_effect(group, entry.index, effect)
        return first is here

    def _took_effect(self, group: str, index: int, effect: Effect) -> None:
        effects = self._effects.setdefault((self.group_of(group), effect.request), [])
        if any(known.index == index for known in effects):
            return
        for known in effects:
            if known not in self._undone:
                self.accuse(
                    "exactly once",
                    f"{effect.request} took effect at {known.shard}/{known.index} and "
                    f"{group}/{index}",
                )
        effects.append(EffectAt(group, index, effect.ok, effect.value))

    def in_force(self, shard: str, index: int) -> frozenset[EffectAt]:
        """What took effect in a shard's own log up to an entry, and was not undone."""
        return frozenset(
            effect
            for effects in self._effects.values()
            for effect in effects
            if effect.shard == shard and effect.index <= index and effect not in self._undone
        )

    def taken_back(self, shard: str, in_force: frozenset[EffectAt]) -> None:
        """Of all that ever took effect in a shard's log only this has, from now on."""
        for effects in self._effects.values():
            for effect in effects:
                if effect.shard == shard:
                    (self._undone.discard if effect in in_force else self._undone.add)(effect)

    def state_at(self, group: str, index: int) -> bytes | None:
        """The digest after an entry, and what else was compared there, if any replica has been."""
        there = self._applied.get((group, index))
        return None if there is None else there.digest

    def entry_at(self, group: str, index: int) -> Entry | None:
        """What the replicas applied there."""
        there = self._applied.get((group, index))
        return None if there is None else Entry(index, there.term, there.command)

    def leads(self, node: str, group: str, epoch: int, term: int) -> None:
        other = self._leader_of.get((group, epoch, term))
        if other is None:
            self.elections += 1
            other = self._leader_of[group, epoch, term] = node
        if other != node:
            self.accuse("election safety", f"{other} and {node} lead {group} in term {term}")

    def acknowledged_write(self, node: str, group: str, command: bytes, answer: Applied) -> None:
        """A replica answered a proposal: the answer must be what was applied there."""
        self.acknowledged += 1
        there = self._applied.get((group, answer.index))
        if there is None or there.command != command or there.term != answer.term:
            self.accuse(
                "honest answers",
                f"{node} answered {describe(command)} with {group}/{answer.index} of term "
                f"{answer.term}, where "
                + ("nothing was applied" if there is None else describe(there.command)),
            )

    # -- at the end --

    def history(
        self,
        calls: list[Call],
        ledger_of: Callable[[Call], Ledger],
        end_s: float,
    ) -> list[Operation]:
        """The calls as operations, with unknown outcomes settled by the converged ledgers.

        Settling keeps the search short (each unknown doubles it) and makes it stricter: a value
        that some replica showed but that no ledger knows can no longer be explained away.
        """
        operations = []
        for call in calls:
            key = f"{call.group}/{call.key}"
            effects = self._effects.get((call.group, call.request), [])
            answered = call.fate is Fate.ANSWERED
            if call.kind is not Kind.READ and effects:
                # The one that it was answered for, if a rewind let it happen twice.
                own = [one for one in effects if one.index <= call.index] or effects[:1]
                call.order = own[-1].index
                operations += [
                    call.as_operation(key, UNKNOWN_RETURN, one.ok, one.value, one.index)
                    for one in effects
                    if one is not own[-1] or (not answered and one in self._undone)
                ]
            if answered:
                operations.append(call.as_operation(key, call.returned_s, call.ok, call.result))
            if call.kind is Kind.READ:
                continue
            kept = ledger_of(call)(call.request)
            if any(one in self._undone for one in effects):
                continue  # what the ledger says of it depends on when it was asked again
            if answered and kept is None:
                self.accuse("acknowledged writes survive", f"{call} is in no ledger")
            elif answered and kept != (call.ok, call.result):
                self.accuse("honest answers", f"{call}, but the ledger says {kept}")
            elif not answered and kept is not None:
                if call.fate is Fate.REFUSED:
                    self.accuse("refused means not done", f"{call} took effect: {kept}")
                operations.append(call.as_operation(key, end_s, *kept))
        return operations

    def linearizable(self, operations: list[Operation]) -> None:
        report = check(operations)
        self.checker_steps += report.steps
        if report.verdict is Verdict.UNKNOWN:
            self.accuse("linearizability", "the search was cut off: no verdict")
        for key in report.violations:
            self.accuse("linearizability", f"of {key.key}: no order explains {_name(key.blocked)}")


def describe(command: bytes) -> str:
    if not command:
        return "an empty entry"
    if is_control(command):
        return str(decode(command))
    if not isinstance(msgpack.unpackb(command)[0], str):
        return shard_machine.describe(command)
    c = Command.decode(command)
    return f"{c.request} ({c.kind} {c.key} {c.value})"


def _name(operation: Operation | None) -> str:
    if operation is None:
        return "it"
    end = "..." if operation.returned_s == UNKNOWN_RETURN else f"{operation.returned_s:.4f}"
    return (
        f"client {operation.client}'s {operation.kind.value} [{operation.invoked_s:.4f}, {end}] "
        f"value {operation.value} expected {operation.expected} result {operation.result}"
    )
