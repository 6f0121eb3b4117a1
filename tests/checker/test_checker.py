"""The judge is judged first: planted violations, planted non-violations, brute force, speed."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Hashable

import pytest

from agentmem_chaos.checker import (
    GONE,
    UNKNOWN_RETURN,
    Kind,
    Operation,
    Verdict,
    check,
    check_register,
)


def read(invoked: float, returned: float, result: Hashable, client: int = 0) -> Operation:
    return Operation(client, "k", invoked, returned, Kind.READ, result=result)


def write(invoked: float, returned: float, value: Hashable, client: int = 0) -> Operation:
    return Operation(client, "k", invoked, returned, Kind.WRITE, value=value)


def cas(
    invoked: float, returned: float, expected: Hashable, value: Hashable, took_effect: bool
) -> Operation:
    return Operation(0, "k", invoked, returned, Kind.CAS, value, expected, took_effect)


def delete(
    invoked: float, returned: float, expected: Hashable, took_effect: bool | None = None
) -> Operation:
    return Operation(0, "k", invoked, returned, Kind.DELETE, None, expected, took_effect)


def add(invoked: float, returned: float, amount: int, total: int | None = None) -> Operation:
    return Operation(0, "k", invoked, returned, Kind.ADD, amount, result=total)


LOST = UNKNOWN_RETURN

LEGAL = {
    "reads_of_the_initial_value": [read(0, 1, None)],
    "a_read_during_a_write_sees_the_old_value": [write(0, 1, 1), write(2, 9, 2), read(3, 4, 1)],
    "a_read_during_a_write_sees_the_new_value": [write(0, 1, 1), write(2, 9, 2), read(3, 4, 2)],
    "overlapping_writes_in_either_order": [write(0, 9, 1), write(0, 9, 2), read(10, 11, 1)],
    "a_lost_write_that_took_effect_late": [
        write(0, 1, 1),
        write(2, LOST, 2),
        read(3, 4, 1),
        read(5, 6, 2),
    ],
    "a_lost_write_that_never_took_effect": [write(0, 1, 1), write(2, LOST, 2), read(9, 10, 1)],
    "a_cas_that_failed_because_of_a_lost_write_nobody_read": [
        write(0, 1, 1),
        write(2, LOST, 2),
        cas(3, 4, 1, 5, False),
        write(5, 6, 7),
        read(7, 8, 7),
    ],
    "a_lost_cas_that_took_effect": [write(0, 1, 1), cas(2, LOST, 1, 2, False), read(5, 6, 2)],
    "equal_times_overlap": [write(0, 1, 1), write(1, 2, 2), read(1, 1, 1)],
    "overlapping_adds_in_the_order_of_their_sums": [add(0, 9, 1, 3), add(0, 9, 2, 2)],
    "an_add_to_nothing": [add(0, 1, 5, 5), read(2, 3, 5)],
    "a_lost_add_that_took_effect": [add(0, LOST, 1), add(2, 3, 2, 3), read(4, 5, 3)],
    "a_lost_add_that_did_not": [add(0, LOST, 1), add(2, 3, 2, 2), read(4, 5, 2)],
    "a_memory_made_changed_and_deleted": [
        cas(0, 1, None, (1, "tea"), True),
        cas(2, 3, (1, "tea"), (2, "coffee"), True),
        delete(4, 5, (1, "tea"), False),
        delete(6, 7, (2, "coffee"), True),
        read(8, 9, None),
        read(8, 9, GONE),
    ],
    "a_blind_delete_of_whatever_is_there": [write(0, 1, 1), delete(2, 3, None, True)],
    "a_delete_of_nothing": [delete(0, 1, None, False), write(2, 3, 1), read(4, 5, 1)],
    "a_lost_delete_that_took_effect": [write(0, 1, 1), delete(2, LOST, 1), read(4, 5, None)],
    "a_lost_delete_that_did_not": [write(0, 1, 1), delete(2, LOST, 1), read(4, 5, 1)],
    "a_failed_cas_on_another_value": [write(0, 1, 1), cas(2, 3, 9, 5, False), read(4, 5, 1)],
}

ILLEGAL = {
    "a_deleted_memory_that_is_read": [write(0, 1, 1), delete(2, 3, 1, True), read(4, 5, 1)],
    "a_deleted_memory_that_is_made_again": [
        cas(0, 1, None, 1, True),
        delete(2, 3, None, True),
        cas(4, 5, None, 2, True),
    ],
    "a_delete_of_another_version": [write(0, 1, 1), write(2, 3, 2), delete(4, 5, 1, True)],
    "a_delete_that_failed_without_a_reason": [write(0, 1, 1), delete(2, 3, 1, False)],
    "a_memory_deleted_twice": [write(0, 1, 1), delete(2, 5, None, True), delete(2, 5, None, True)],
    "a_stale_read": [write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)],
    "a_read_from_the_future": [read(0, 1, 1), write(2, 3, 1)],
    "a_value_nobody_wrote": [write(0, 1, 1), read(2, 3, 7)],
    "a_lost_acknowledged_write": [write(0, 1, 1), read(2, 3, None)],
    "reads_that_go_back": [write(0, 1, 1), write(2, 9, 2), read(3, 4, 2), read(5, 6, 1)],
    "a_lost_write_that_took_effect_and_vanished": [
        write(0, 1, 1),
        write(2, LOST, 2),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
    "two_cas_on_one_value": [write(0, 1, 1), cas(2, 5, 1, 2, True), cas(2, 5, 1, 3, True)],
    "a_cas_that_failed_without_a_reason": [write(0, 1, 1), cas(2, 3, 1, 2, False)],
    "a_cas_that_won_on_a_wrong_value": [write(0, 1, 1), cas(2, 3, 9, 2, True)],
    "an_add_that_took_effect_twice": [add(0, 1, 1, 1), read(2, 3, 2)],
    "an_acknowledged_add_that_was_lost": [add(0, 1, 1, 1), add(2, 3, 1, 1)],
    "adds_that_saw_each_other": [add(0, 9, 1, 3), add(0, 9, 2, 3)],
    "a_write_that_took_effect_twice": [
        write(0, 1, 1),
        read(2, 3, 1),
        write(4, 5, 2),
        read(6, 7, 1),
    ],
}


@pytest.mark.parametrize("name", LEGAL)
def test_a_planted_legal_history_is_accepted(name: str) -> None:
    assert check(LEGAL[name]).verdict is Verdict.LINEARIZABLE


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_planted_violation_is_found_and_named(name: str) -> None:
    report = check(ILLEGAL[name])
    assert report.verdict is Verdict.VIOLATION
    assert report.violations[0].blocked in ILLEGAL[name]


def test_keys_do_not_excuse_each_other() -> None:
    bad = [Operation(0, "a", 0, 1, Kind.READ, result=1)]
    good = [Operation(0, "b", 0, 1, Kind.WRITE, value=1)]
    assert [r.key for r in check(good + bad).violations] == ["a"]


def brute_force(operations: list[Operation]) -> bool:
    """Every order of every subset that real time allows; nothing is left out beforehand."""
    needed = frozenset(i for i, op in enumerate(operations) if op.answered)

    def legal(op: Operation, state: Hashable) -> tuple[bool, Hashable]:
        if op.kind is Kind.READ:
            return (not op.answered or op.result == state), state
        if op.kind is Kind.WRITE:
            return True, op.value
        if op.kind is Kind.ADD:
            total = (state or 0) + op.value
            return (not op.answered or op.result == total), total
        hit = state == op.expected
        return (not op.answered or op.result == hit), (op.value if hit else state)

    def search(done: frozenset[int], state: Hashable) -> bool:
        if needed <= done:
            return True
        rest = [i for i in range(len(operations)) if i not in done]
        horizon = min(operations[i].returned_s for i in rest)
        for i in rest:
            if operations[i].invoked_s <= horizon:
                ok, after = legal(operations[i], state)
                if ok and search(done | {i}, after):
                    return True
        return False

    return search(frozenset(), None)


def random_history(rng: random.Random, length: int) -> list[Operation]:
    operations = []
    for client in range(length):
        invoked = float(rng.randint(0, 12))
        returned = LOST if rng.random() < 0.25 else invoked + rng.randint(0, 6)
        kind = rng.choice([Kind.READ, Kind.READ, Kind.WRITE, Kind.CAS, Kind.ADD])
        result: Hashable = rng.random() < 0.5
        if kind in (Kind.READ, Kind.ADD):
            result = rng.choice([None, 1, 2, 3] if kind is Kind.READ else [1, 2, 3, 4])
        operations.append(
            Operation(
                client,
                "k",
                invoked,
                returned,
                kind,
                value=rng.randint(1, 3),
                expected=rng.choice([None, 1, 2, 3]),
                result=result,
            )
        )
    return operations


def test_the_checker_agrees_with_brute_force_on_random_histories() -> None:
    rng = random.Random(7)
    verdicts = {Verdict.LINEARIZABLE: 0, Verdict.VIOLATION: 0}
    for _ in range(12_000):
        history = random_history(rng, rng.randint(1, 7))
        found = check_register(history).verdict
        expected = Verdict.LINEARIZABLE if brute_force(history) else Verdict.VIOLATION
        assert found is expected, history
        verdicts[found] += 1
    assert min(verdicts.values()) > 1_500, verdicts


def test_a_claimed_order_never_changes_the_verdict() -> None:
    """Right or wrong, complete or not: the order may only make the search shorter."""
    rng = random.Random(11)
    proofs = 0
    for _ in range(6_000):
        history = random_history(rng, rng.randint(1, 6))
        expected = Verdict.LINEARIZABLE if brute_force(history) else Verdict.VIOLATION
        claims = [float(at) for at in range(len(history))]
        rng.shuffle(claims)
        if rng.random() < 0.2:
            claims[0] = None  # type: ignore[call-overload]
        claimed = [
            dataclasses.replace(op, order=claim) for op, claim in zip(history, claims, strict=True)
        ]
        report = check_register(claimed)
        assert report.verdict is expected, claimed
        proofs += report.verdict is Verdict.LINEARIZABLE
    assert proofs > 500


def test_a_true_order_proves_in_linear_time_what_would_be_searched_for_ever() -> None:
    # Twenty clients always write at once on one key; reads see the writes in log order.
    history = []
    for turn in range(100):
        for client in range(20):
            at = turn * 20 + client
            history.append(
                Operation(
                    client, "hot", float(turn), turn + 1.5, Kind.WRITE, value=at, order=float(at)
                )
            )
        history.append(
            Operation(
                99,
                "hot",
                float(turn),
                turn + 1.5,
                Kind.READ,
                result=turn * 20 + 7,
                order=turn * 20 + 7.5,
            )
        )
    report = check(history, steps_max_per_key=20_000)
    assert report.verdict is Verdict.LINEARIZABLE
    assert report.steps == len(history)


def simulated_history(
    operations: int, clients: int, keys: int, unknown: float, seed: int
) -> list[Operation]:
    """A history that some real register produced: each operation acts at one instant."""
    rng = random.Random(seed)
    free_s = [0.0] * clients
    planned = []
    for _ in range(operations):
        client = min(range(clients), key=free_s.__getitem__)
        invoked = free_s[client] + rng.random() * 0.2
        acts = invoked + rng.random()
        returned = acts + rng.random()
        planned.append((acts, client, invoked, returned, rng.randrange(keys)))
        free_s[client] = returned
    planned.sort()
    state: dict[int, int] = {}
    history = []
    for value, (_, client, invoked, returned, key) in enumerate(planned):
        kind = rng.choice([Kind.READ, Kind.WRITE, Kind.WRITE, Kind.CAS])
        lost = rng.random() < unknown
        takes_effect = not lost or rng.random() < 0.5
        current = state.get(key)
        expected = current if rng.random() < 0.7 else -1
        result: Hashable = current if kind is Kind.READ else expected == current
        if takes_effect and (kind is Kind.WRITE or (kind is Kind.CAS and result)):
            state[key] = value
        history.append(
            Operation(
                client, key, invoked, LOST if lost else returned, kind, value, expected, result
            )
        )
    return history


def test_a_hundred_thousand_operations_are_checked_in_seconds() -> None:
    history = simulated_history(100_000, clients=10, keys=1000, unknown=0.01, seed=1)
    started = time.process_time()
    assert check(history).verdict is Verdict.LINEARIZABLE
    assert time.process_time() - started < 10.0


def test_one_long_key_costs_as_much_a_step_at_its_end_as_at_its_start() -> None:
    history = simulated_history(30_000, clients=3, keys=1, unknown=0.0, seed=2)
    started = time.process_time()
    assert check(history).verdict is Verdict.LINEARIZABLE
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize("seed", range(5))
def test_one_stale_read_among_ten_thousand_is_found(seed: int) -> None:
    history = simulated_history(10_000, clients=5, keys=20, unknown=0.01, seed=seed)
    rng = random.Random(seed)
    reads = [i for i, op in enumerate(history) if op.kind is Kind.READ and op.answered and i > 5000]
    victim = history[rng.choice(reads)]
    older = next(
        op
        for op in history
        if op.key == victim.key
        and op.kind is Kind.WRITE
        and op.answered
        # Overwritten since: by a write that was acknowledged long before the read began.
        and any(
            later.key == op.key
            and later.kind is Kind.WRITE
            and later.invoked_s > op.returned_s
            and later.returned_s < victim.invoked_s
            for later in history
        )
    )
    stale = Operation(
        victim.client,
        victim.key,
        victim.invoked_s,
        victim.returned_s,
        Kind.READ,
        result=older.value,
    )
    report = check([stale if op is victim else op for op in history])
    assert [r.key for r in report.violations] == [victim.key]


def test_a_search_that_explodes_is_cut_off_and_is_not_a_pass() -> None:
    # Twenty clients on one key for ever, and a read that can never be explained at the end.
    history = [
        Operation(client, "hot", float(turn), turn + 30.0, Kind.WRITE, value=(client, turn))
        for client, turn in itertools.product(range(20), range(40))
    ]
    history.append(Operation(99, "hot", 200.0, 201.0, Kind.READ, result="never written"))
    report = check(history, steps_max_per_key=20_000)
    assert report.verdict is Verdict.UNKNOWN
    assert report.steps < 100_000
