"""The circuit breaker: its three states, and what no order of events can make it do."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentmem_client.breaker import Breaker, Cause, Closed, HalfOpen, Open
from agentmem_client.budgets import HedgeBudget, RetryBudget
from agentmem_client.policy import Policy

POLICY = Policy()


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    assert breaker.failed(now, Cause.SILENT, is_certain=True)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_in_between_does_not_let_them_add_up() -> None:
    breaker = Breaker(POLICY)
    for _ in range(POLICY.breaker_failures_max - 1):
        assert not breaker.failed(1.0, Cause.REFUSING, is_certain=False)
    breaker.succeeded(sent_at=1.0)
    for _ in range(POLICY.breaker_failures_max - 1):
        assert not breaker.failed(2.0, Cause.REFUSING, is_certain=False)
    assert breaker.failed(2.0, Cause.REFUSING, is_certain=False)
    assert isinstance(breaker.state, Open)


def test_certainty_opens_it_at_once() -> None:
    assert isinstance(opened().state, Open)


def test_one_probe_is_given_out_when_its_time_has_come() -> None:
    breaker = opened(10.0)
    assert not breaker.take_probe(10.4)
    assert breaker.take_probe(10.5)
    assert isinstance(breaker.state, HalfOpen)
    assert not breaker.take_probe(10.6)


def test_a_probe_that_nobody_reports_is_given_out_again() -> None:
    breaker = opened()
    assert breaker.take_probe(1.0)
    assert breaker.take_probe(1.0 + 2 * POLICY.probe_s_max)


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound() -> None:
    breaker = opened()
    now, waits = 0.0, []
    for _ in range(7):
        begun = now
        while not breaker.take_probe(now):
            now += 0.25
        waits.append(now - begun)
        breaker.probed(now, is_well=False, cause=Cause.SILENT)
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_a_probe_that_is_answered_closes_it() -> None:
    breaker = opened()
    assert breaker.take_probe(1.0)
    breaker.probed(1.1, is_well=True, cause=Cause.SILENT)
    assert breaker.state == Closed()


def test_an_answer_to_a_request_from_before_it_opened_does_not_close_it() -> None:
    breaker = opened(10.0)
    breaker.succeeded(sent_at=9.9)
    assert not breaker.is_closed
    breaker.succeeded(sent_at=10.1)
    assert breaker.is_closed


class AnyOrder(RuleBasedStateMachine):
    """Failures, successes and probes in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(POLICY)
        self.now = 0.0
        self.opened_at = -1.0
        self.probe_at: float | None = None  # of the one that is under way

    @rule(seconds=st.floats(0.0, 8.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(is_certain=st.booleans(), cause=st.sampled_from(Cause))
    def fails(self, is_certain: bool, cause: Cause) -> None:
        before = self.breaker.state
        did_open = self.breaker.failed(self.now, cause, is_certain=is_certain)
        if isinstance(before, Closed):
            assert did_open == isinstance(self.breaker.state, Open)
            assert did_open or not is_certain
        else:
            # However many requests fail late, they neither end the probe nor put it off.
            assert self.breaker.state == before
        if did_open:
            self.opened_at = self.now

    @rule(before=st.floats(0.0, 3.0))
    def succeeds(self, before: float) -> None:
        state = self.breaker.state
        self.breaker.succeeded(self.now - before)
        if self.now - before >= self.opened_at:
            assert self.breaker.is_closed
        if isinstance(state, Closed) or self.breaker.is_closed:
            self.probe_at = None

    @rule()
    def asks_for_a_probe(self) -> None:
        if self.breaker.take_probe(self.now):
            lost = self.probe_at is None or self.now - self.probe_at >= 2 * POLICY.probe_s_max
            assert lost, "two probes at once"
            assert self.now - self.opened_at >= POLICY.breaker_s_first
            self.probe_at = self.now

    @rule(is_well=st.booleans())
    def probe_ends(self, is_well: bool) -> None:
        if self.probe_at is None:
            return
        self.breaker.probed(self.now, is_well=is_well, cause=Cause.SILENT)
        assert self.breaker.is_closed or not is_well
        if not is_well and not self.breaker.is_closed:
            self.opened_at = self.now
        self.probe_at = None

    @invariant()
    def an_ill_node_is_probed_within_the_bound(self) -> None:
        state = self.breaker.state
        if isinstance(state, Open):
            assert state.probe_at - state.since <= POLICY.breaker_s_max


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_hedges_are_a_share_of_the_calls_after_a_burst() -> None:
    budget = HedgeBudget(Policy(hedge_burst=5.0, hedge_share_max=0.05))
    assert [budget.spend() for _ in range(6)] == [True] * 5 + [False]
    spent = 0
    for _ in range(1_000):
        budget.earn()
        spent += budget.spend()
    assert spent == pytest.approx(50, abs=1)


def test_a_retry_at_once_takes_nothing_when_there_is_nothing() -> None:
    budget = RetryBudget(Policy(retry_tokens_max=1.0, retry_tokens_per_s=1.0))
    assert budget.spend_at_once(0.0)
    assert [budget.spend_at_once(0.0) for _ in range(5)] == [False] * 5
    assert budget.spend_at_once(1.0)
