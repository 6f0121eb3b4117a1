"""Was this history linearizable? Lowe's version of the Wing and Gong search, one key at a time.

A register is local (Herlihy and Wing, theorem 1): a history is linearizable when each key's
part of it is, so every key is searched alone. The search walks the events of one key in order
of time, tries to let each pending operation take effect, remembers every (done, state) it has
seen (Lowe, "Testing for linearizability", 2017) and goes back when an operation returned that
could not take effect. It is exponential at worst, so it counts its steps and answers UNKNOWN
rather than run for ever: an UNKNOWN is never counted as a pass.

A system that keeps a log knows in which order its operations took effect and may say so
(`Operation.order`). That order is not believed but tested: if it explains every result and
goes against no real time, it is a proof, found in linear time; if not, the search decides.

Record an operation when it is *invoked*: one that the end of the run cut off is an unknown
outcome, not nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum

UNKNOWN_RETURN = math.inf
STEPS_MAX_PER_KEY = 2_000_000


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    CAS = "cas"
    ADD = "add"
    DELETE = "delete"


class Gone(Enum):
    """The state of a register after a delete: nothing is ever stored there again."""

    GONE = "gone"

    def __str__(self) -> str:
        return self.value


GONE = Gone.GONE


class Verdict(Enum):
    LINEARIZABLE = "linearizable"
    VIOLATION = "violation"
    UNKNOWN = "unknown"  # the search was cut off


@dataclass(frozen=True, slots=True)
class Operation:
    """One client operation on one register.

    `returned_s` is `UNKNOWN_RETURN` when no answer came: it may take effect at any time after
    `invoked_s`, or never. `result` is the value of a read, whether a cas or a delete took effect,
    and the sum after an add (`None` counts as zero). A delete takes effect where there is a value,
    the `expected` one if one is named, and leaves `GONE`; a read of that may answer `None` too,
    but a cas that expects `None` fails on it.
    """

    client: int
    key: Hashable
    invoked_s: float
    returned_s: float
    kind: Kind
    value: Hashable = None  # what a write or a cas stores, or an add adds
    expected: Hashable = None  # what a cas compares with
    result: Hashable = None
    order: float | None = None  # where the system says that it took effect

    @property
    def answered(self) -> bool:
        return self.returned_s != UNKNOWN_RETURN


@dataclass(frozen=True, slots=True)
class KeyReport:
    """The verdict on one key; `blocked` is what the deepest search could not place."""

    key: Hashable
    verdict: Verdict
    operations: int
    steps: int
    blocked: Operation | None = None


@dataclass(frozen=True, slots=True)
class Report:
    keys: list[KeyReport]

    @property
    def verdict(self) -> Verdict:
        found = {report.verdict for report in self.keys}
        if Verdict.VIOLATION in found:
            return Verdict.VIOLATION
        return Verdict.UNKNOWN if Verdict.UNKNOWN in found else Verdict.LINEARIZABLE

    @property
    def violations(self) -> list[KeyReport]:
        return [report for report in self.keys if report.verdict is Verdict.VIOLATION]

    @property
    def steps(self) -> int:
        return sum(report.steps for report in self.keys)


def check(
    history: Iterable[Operation],
    *,
    initial: Hashable = None,
    steps_max_per_key: int = STEPS_MAX_PER_KEY,
) -> Report:
    """Check every key of a history whose registers start as `initial`."""
    by_key: dict[Hashable, list[Operation]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    return Report(
        [
            check_register(operations, initial=initial, steps_max=steps_max_per_key)
            for operations in by_key.values()
        ]
    )


def check_register(
    operations: list[Operation],
    *,
    initial: Hashable = None,
    steps_max: int = STEPS_MAX_PER_KEY,
) -> KeyReport:
    """Check the operations of one key."""
    if not operations:
        raise ValueError("a register without operations has no verdict")
    key, needed = operations[0].key, _needed(operations)
    if _explained_by_order(needed, initial):
        return KeyReport(key, Verdict.LINEARIZABLE, len(operations), len(needed))
    return _Search(needed, initial).run(key, len(operations), steps_max)


def _explained_by_order(operations: list[Operation], initial: Hashable) -> bool:
    """Whether the order that the system claims is a linearization."""
    claimed = []
    for op in operations:
        if op.order is None:
            return False
        claimed.append((op.order, op.invoked_s, op))
    claimed.sort(key=lambda claim: claim[:2])
    state, invoked_s = initial, -math.inf
    for _, _, op in claimed:
        if op.returned_s < invoked_s:
            return False  # it was over before something that is said to precede it began
        invoked_s = max(invoked_s, op.invoked_s)
        legal, state = _step(op, state)
        if not legal:
            return False
    return True


def _needed(operations: list[Operation]) -> list[Operation]:
    """Drop what cannot change the verdict; each unanswered operation doubles the search.

    An unanswered read says nothing. An unanswered write or cas of a value that nobody read and
    no cas expected can be taken out of any linearization, unless a cas failed after it was
    invoked: that cas may have failed *because of* it. Adds pass every value on, and deletes depend
    on all of them, so nothing is dropped from a history that has any.
    """
    if any(op.kind is Kind.ADD or op.kind is Kind.DELETE for op in operations):
        return [op for op in operations if op.answered or op.kind is not Kind.READ]
    observed: set[Hashable] = set()
    last_failed_cas_s = -math.inf
    for op in operations:
        if op.kind is Kind.READ and op.answered:
            observed.add(op.result)
        elif op.kind is Kind.CAS:
            observed.add(op.expected)
            if op.answered and not op.result:
                last_failed_cas_s = max(last_failed_cas_s, op.returned_s)
    return [
        op
        for op in operations
        if op.answered
        or (
            op.kind is not Kind.READ and (op.value in observed or last_failed_cas_s >= op.invoked_s)
        )
    ]


class _Search:
    """The events of one key as a doubly linked list of integers.

    Event 0 is the head. An answered operation has a call and a return event, an unanswered one
    a call only: nothing ever forces it to take effect. At equal times calls stand before
    returns, since such operations may have overlapped.
    """

    def __init__(self, operations: list[Operation], initial: Hashable) -> None:
        self.initial = initial
        answered = sorted((op for op in operations if op.answered), key=lambda op: op.invoked_s)
        unknown = [op for op in operations if not op.answered]
        self.operations = answered + unknown
        self.answered_count = len(answered)
        events: list[tuple[float, int, int]] = []
        for index, op in enumerate(self.operations):
            events.append((op.invoked_s, 0, index))
            if op.answered:
                events.append((op.returned_s, 1, index))
        events.sort()
        size = len(events) + 1
        self.next = [*range(1, size), 0]
        self.prev = list(range(-1, size - 1))
        self.operation_of = [-1] * size
        self.return_of = [0] * size  # of a call: its return event, 0 when unanswered
        self.is_return = [False] * size
        call_event = [0] * len(self.operations)
        for event, (_, kind, index) in enumerate(events, start=1):
            self.operation_of[event] = index
            if kind == 0:
                call_event[index] = event
            else:
                self.is_return[event] = True
                self.return_of[call_event[index]] = event

    def run(self, key: Hashable, total: int, steps_max: int) -> KeyReport:
        following = self.next
        operations, answered_count = self.operations, self.answered_count
        state = self.initial
        # What has taken effect: answered operations as a window (all below `low` are done, the
        # rest are bits from `low` on), so that a step costs the same in the first operation and
        # in the hundred-thousandth; unanswered ones, which are few, as bits of their own.
        low, window, unknown_done = 0, 0, 0
        left = answered_count
        seen: set[tuple[int, int, int, Hashable]] = set()
        undo: list[tuple[int, Hashable, int, int, int]] = []
        deepest_left, blocked = left + 1, -1
        steps = 0
        event = following[0]
        while left:
            if event and not self.is_return[event]:
                steps += 1
                index = self.operation_of[event]
                op = operations[index]
                legal, after = _step(op, state)
                if legal:
                    if index < answered_count:
                        new_low, new_window = low, window | 1 << (index - low)
                        while new_window & 1:
                            new_window >>= 1
                            new_low += 1
                        new_unknown = unknown_done
                    else:
                        new_low, new_window = low, window
                        new_unknown = unknown_done | 1 << (index - answered_count)
                    mark = (new_low, new_window, new_unknown, after)
                    if mark not in seen:
                        if steps > steps_max:
                            return KeyReport(key, Verdict.UNKNOWN, total, steps)
                        seen.add(mark)
                        undo.append((event, state, low, window, unknown_done))
                        state, low, window, unknown_done = after, new_low, new_window, new_unknown
                        left -= index < answered_count
                        self._lift(event)
                        event = following[0]
                        continue
                event = following[event]
                continue
            # A return was reached whose operation has not taken effect: this branch is dead.
            if left < deepest_left:
                deepest_left, blocked = left, self.operation_of[event]
            if not undo:
                return KeyReport(key, Verdict.VIOLATION, total, steps, operations[blocked])
            event, state, low, window, unknown_done = undo.pop()
            left += self.operation_of[event] < answered_count
            self._unlift(event)
            event = following[event]
        return KeyReport(key, Verdict.LINEARIZABLE, total, steps)

    def _lift(self, call: int) -> None:
        self._unlink(call)
        if self.return_of[call]:
            self._unlink(self.return_of[call])

    def _unlift(self, call: int) -> None:
        if self.return_of[call]:
            self._relink(self.return_of[call])
        self._relink(call)

    def _unlink(self, event: int) -> None:
        before, after = self.prev[event], self.next[event]
        self.next[before] = after
        if after:
            self.prev[after] = before

    def _relink(self, event: int) -> None:
        before, after = self.prev[event], self.next[event]
        self.next[before] = event
        if after:
            self.prev[after] = event


def _step(op: Operation, state: Hashable) -> tuple[bool, Hashable]:
    """Whether `op` may take effect in `state`, and the state after it."""
    if op.kind is Kind.READ:
        return op.result == state or (state is GONE and op.result is None), state
    if op.kind is Kind.WRITE:
        return True, op.value
    if op.kind is Kind.ADD:
        total = (state or 0) + op.value  # type: ignore[operator]
        return not op.answered or op.result == total, total
    if op.kind is Kind.DELETE:
        there = state is not None and state is not GONE
        matches = there and (op.expected is None or state == op.expected)
        return not op.answered or bool(op.result) == matches, GONE if matches else state
    matches = state == op.expected
    if op.answered and bool(op.result) != matches:
        return False, state
    return True, (op.value if matches else state)
