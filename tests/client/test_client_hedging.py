"""Slow and stopped nodes, on a virtual clock: what a call waits, who is asked, and what it costs.

`World` is a driver like the real one, with simulated nodes in place of sockets: it obeys the
exchanges of any number of calls, and moves its clock to whatever happens next.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_client import DeadlineExceeded, NotFound, Policy, calls
from agentmem_client.core import Exchange
from agentmem_client.instructions import Done, Fail, Failure, Send, Wait
from agentmem_client.router import Router
from agentmem_client.topology import Topology

URLS = {"n1": "http://n1", "n2": "http://n2", "n3": "http://n3"}
N1, N2, N3 = URLS.values()
QUICK_S = 0.002
FOUND = json.dumps({"results": [], "token": "", "partial": []}).encode()


def view(leader: str | None = "n1") -> dict[str, Any]:
    shard = {"epoch": 1, "members": list(URLS), "leader": leader, "slots": [[0, 16_384]]}
    nodes = {name: {"http": url} for name, url in URLS.items()}
    return {"version": 1, "tenant": "default", "nodes": nodes, "shards": {"s00": shard}}


def refusal(code: str, **details: Any) -> tuple[int, bytes]:
    return 503, json.dumps({"code": code, "detail": code, "details": details}).encode()


# What a node does with a request at a time: (seconds until, status and body), or silence.
Answer = tuple[float, tuple[int, bytes] | Failure] | None
Node = Callable[[Send, float], Answer]


def quick(_send: Send, _now: float) -> Answer:
    return QUICK_S, (200, FOUND)


def slow(seconds: float) -> Node:
    return lambda _send, _now: (seconds, (200, FOUND))


def stopped(since: float = -math.inf, until: float = math.inf) -> Node:
    """As under SIGSTOP: connections are taken by the kernel, and nobody answers."""
    return lambda _send, now: None if since <= now < until else (QUICK_S, (200, FOUND))


@dataclass
class Outcome:
    took_s: float
    result: Any
    asked: list[str]


@dataclass
class World:
    nodes: dict[str, Node]
    policy: Policy = field(default_factory=Policy)
    leader: str | None = "n1"
    now: float = 0.0
    asked: list[str] = field(default_factory=list)  # of requests that are not for the map
    probed: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Router([N1], lambda: 0.5, self.policy)
        self.router.learn(Topology.read(view(self.leader)))

    def answer(self, send: Send) -> Answer:
        url, _, path = send.url.partition("/api")
        answer = self.nodes[url](send, self.now)
        if answer is not None and answer[1] == (200, FOUND) and path.endswith("/cluster"):
            return answer[0], (200, json.dumps(view(self.leader)).encode())
        return answer

    def call(self, call: calls.Call[Any]) -> Outcome:
        return self.together([call])[0]

    def together(self, wanted: Iterable[calls.Call[Any]]) -> list[Outcome]:
        """Start the calls at once, and run until all have ended."""
        started = self.now
        order = itertools.count()
        events: list[tuple[float, int, int, str, Any]] = []
        exchanges: list[Exchange[Any]] = []
        outcomes: dict[int, Outcome] = {}
        turns: dict[int, int] = {}  # a wake-up counts only when nothing else happened before
        on_the_wire: dict[int, set[int]] = {}
        asked: dict[int, list[str]] = {}

        def obey(which: int, step: Any) -> None:
            turns[which] = turns.get(which, 0) + 1
            for url in self.router.probes_due(self.now):
                self.probed.append((self.now, url))
                probe = Send(0, "GET", f"{url}/health/ready", {}, None, 1.0, 1.0)
                reply = self.nodes[url](probe, self.now)
                at = self.now + (reply[0] if reply else self.policy.probe_s_max)
                status = reply[1][0] if reply and not isinstance(reply[1], Failure) else None
                heapq.heappush(events, (at, next(order), which, "probed", (url, status)))
            if isinstance(step, Done | Fail):
                result = step.value if isinstance(step, Done) else step.error
                outcomes[which] = Outcome(self.now - started, result, asked[which])
                return
            if isinstance(step, Send):
                if not step.url.endswith("/cluster"):
                    self.asked.append(step.url.partition("/api")[0])
                    asked[which].append(self.asked[-1])
                on_the_wire[which].add(step.attempt)
                reply = self.answer(step)
                if reply is None or reply[0] >= step.timeout_s:
                    reply = step.timeout_s, Failure.TIMED_OUT
                happens = (step.attempt, step.url, reply[1])
                heapq.heappush(events, (self.now + reply[0], next(order), which, "ended", happens))
                pause = step.patience_s
            else:
                assert isinstance(step, Wait)
                pause = step.seconds
            assert pause >= 0.0
            if pause < math.inf:
                heapq.heappush(events, (self.now + pause, next(order), which, "woke", turns[which]))

        for which, call in enumerate(wanted):
            exchange = Exchange(call, self.router, self.now)
            exchanges.append(exchange)
            on_the_wire[which], asked[which] = set(), []
            obey(which, exchange.start(self.now))
        while len(outcomes) < len(exchanges):
            assert events, "the calls hang"
            self.now, _, which, what, data = heapq.heappop(events)
            if what == "probed":
                self.router.probed(data[0], self.now, data[1])
                continue
            if which in outcomes:
                continue
            if what == "woke":
                if turns[which] == data:
                    obey(which, exchanges[which].woke(self.now))
                continue
            number, _url, came = data
            if number not in on_the_wire[which]:
                continue
            on_the_wire[which].discard(number)
            if isinstance(came, Failure):
                obey(which, exchanges[which].failed(number, came, "text", self.now))
            else:
                obey(which, exchanges[which].answered(number, came[0], {}, came[1], self.now))
        while events:  # what is still under way is dropped, but probes are reported
            self_now, _, _, what, data = heapq.heappop(events)
            if what == "probed":
                self.router.probed(data[0], self_now, data[1])
        return [outcomes[which] for which in range(len(exchanges))]


def all_of(node: Node) -> dict[str, Node]:
    return dict.fromkeys(URLS.values(), node)


def a_get() -> calls.Call[Any]:
    return calls.search("tea", {"user_id": "ana"})


def an_add() -> calls.Call[Any]:
    return calls.add("tea", None, {"user_id": "ana"})


def test_a_quick_answer_is_never_hedged() -> None:
    world = World(all_of(quick))
    for _ in range(100):
        assert len(world.call(a_get()).asked) == 1


def test_a_stopped_node_costs_the_first_read_one_hedge_delay_and_the_later_ones_nothing() -> None:
    world = World({**all_of(quick), N1: stopped()})
    first = world.call(a_get())
    assert isinstance(first.result, object) and first.asked == [N1, N2]
    assert first.took_s == pytest.approx(world.policy.hedge_s_first + QUICK_S)
    for _ in range(50):
        later = world.call(a_get())
        assert N1 not in later.asked
        assert later.took_s <= 2 * QUICK_S + 1e-9  # the map is fetched again, once
        world.now += 0.01


def test_a_write_to_a_stopped_node_is_sent_to_another_under_the_same_key() -> None:
    keys: list[str] = []

    def noting(send: Send, _now: float) -> Answer:
        if "Idempotency-Key" in send.headers:
            keys.append(send.headers["Idempotency-Key"])
        return QUICK_S, (200, FOUND)

    def silent(send: Send, _now: float) -> Answer:
        keys.append(send.headers["Idempotency-Key"])
        return None

    world = World({N1: silent, N2: noting, N3: noting})
    outcome = world.call(an_add())
    assert outcome.asked == [N1, N2]
    assert outcome.took_s == pytest.approx(world.policy.hedge_write_s_first + QUICK_S)
    assert len(keys) == 2 and len(set(keys)) == 1


def test_all_calls_under_way_leave_a_stopped_node_although_hedges_have_a_budget() -> None:
    world = World({**all_of(quick), N1: stopped()})
    outcomes = world.together([a_get() for _ in range(200)])
    # Ten hedges find out; for the others n1 is ill by then, and moving on is a retry.
    slowest = max(outcome.took_s for outcome in outcomes)
    assert slowest <= world.policy.hedge_s_first + 0.2 + 3 * QUICK_S
    assert all(outcome.asked[-1] != N1 for outcome in outcomes)


def test_a_stopped_node_is_left_even_when_no_hedge_is_allowed_at_all() -> None:
    policy = Policy(hedge_share_max=0.0, hedge_burst=0.0)
    world = World({**all_of(quick), N1: stopped()}, policy)
    outcome = world.call(a_get())
    assert outcome.asked == [N1, N2]
    assert policy.hedge_s_max <= outcome.took_s <= policy.hedge_s_max + 0.3


def test_the_hedge_delay_follows_what_calls_take() -> None:
    world = World(all_of(slow(0.1)))
    for _ in range(30):
        world.call(a_get())
    assert world.router.hedge_after(a_get()) == pytest.approx(0.1)
    # Another kind of call has figures of its own.
    assert world.router.hedge_after(calls.get("x", {})) == world.policy.hedge_s_first


def test_the_hedge_delay_stays_within_its_bounds() -> None:
    for seconds, expected in ((0.0001, 0.03), (0.9, 0.9), (2.0, 1.0)):
        world = World(all_of(quick))
        for _ in range(30):
            world.router.took(a_get(), seconds)
        assert world.router.hedge_after(a_get()) == pytest.approx(expected)


def test_a_cluster_that_is_slow_under_load_is_given_no_more_than_a_share_more() -> None:
    world = World(all_of(quick))
    for _ in range(50):
        world.call(a_get())
    world.nodes = all_of(slow(0.5))  # overload: everything takes longer than any hedge delay
    world.asked.clear()
    for _ in range(20):
        world.together([a_get() for _ in range(50)])
    hedges = len(world.asked) - 1_000
    assert hedges <= world.policy.hedge_burst + 1_000 * world.policy.hedge_share_max + 1


def test_a_node_that_is_slow_but_answers_others_is_not_called_ill() -> None:
    def sometimes(send: Send, now: float) -> Answer:
        return (0.3 if "slow" in (send.body or b"").decode() else QUICK_S), (200, FOUND)

    world = World({**all_of(quick), N1: sometimes})
    for _ in range(30):
        world.call(a_get())
    outcomes = world.together([calls.search("slow", {"user_id": "ana"})])
    assert outcomes[0].asked == [N1, N2]
    world.router._breakers.clear()
    world.router._ill.clear()
    world.router.map_is_stale = False
    # The same with other answers of n1 in between: it runs.
    exchange = Exchange(calls.search("slow", {"user_id": "ana"}), world.router, 10.0)
    first = exchange.start(10.0)
    assert isinstance(first, Send)
    world.router.heard(N1, 10.01)
    hedge = exchange.woke(10.0 + first.patience_s)
    assert isinstance(hedge, Send)
    assert isinstance(exchange.answered(hedge.attempt, 200, {}, FOUND, 10.1), Done)
    assert not world.router.is_ill(N1)


def test_what_the_loser_of_a_race_took_counts_too() -> None:
    world = World({**all_of(quick), N1: slow(0.5)})
    for _ in range(30):
        world.router.took(a_get(), 0.04)
        world.router.heard(N1, world.now)
    exchange = Exchange(a_get(), world.router, 0.0)
    first = exchange.start(0.0)
    assert isinstance(first, Send)
    world.router.heard(N1, 0.02)
    hedge = exchange.woke(0.04)
    assert isinstance(hedge, Send)
    exchange.answered(hedge.attempt, 200, {}, FOUND, 0.3)
    assert world.router._latencies["search"].quantile(1.0) == pytest.approx(0.3)


def test_a_good_answer_wins_over_a_refusal_that_came_first() -> None:
    world = World({N1: slow(0.4), N2: lambda _s, _n: (QUICK_S, refusal("no_quorum")), N3: quick})
    outcome = world.call(a_get())
    assert not isinstance(outcome.result, Exception)
    assert outcome.asked[:2] == [N1, N2]


def test_not_found_is_an_answer_and_ends_the_race() -> None:
    gone = (404, json.dumps({"code": "not_found", "detail": "No such memory."}).encode())
    world = World({**all_of(lambda _s, _n: (QUICK_S, gone)), N1: stopped()})
    outcome = world.call(calls.get("00000000-0000-8000-8000-000000000000", {}))
    assert isinstance(outcome.result, NotFound)
    assert not outcome.result.outcome_unknown


def test_a_write_refused_by_one_node_while_another_was_silent_has_an_unknown_outcome() -> None:
    lost_race = (409, json.dumps({"code": "conflict", "detail": "It moved."}).encode())
    world = World({**all_of(lambda _s, _n: (QUICK_S, lost_race)), N1: stopped()})
    outcome = world.call(calls.update("00000000-0000-8000-8000-000000000000", "x", {}))
    assert outcome.result.outcome_unknown


def test_the_node_that_the_hedge_names_as_leader_is_followed_at_once() -> None:
    world = World(
        {N1: stopped(), N2: lambda _s, _n: (QUICK_S, refusal("not_leader", leader="n3")), N3: quick}
    )
    outcome = world.call(an_add())
    assert outcome.asked == [N1, N2, N3]
    assert outcome.took_s == pytest.approx(world.policy.hedge_write_s_first + 2 * QUICK_S)


def test_every_request_says_what_is_left_of_the_time_and_no_more() -> None:
    said: list[tuple[float, int]] = []

    def noting(send: Send, now: float) -> Answer:
        if not send.url.endswith("/ready"):
            said.append((now, int(send.headers["X-AgentMem-Deadline-Ms"])))
        return None

    world = World(all_of(noting))
    outcome = world.call(calls.search("tea", {"user_id": "ana", "deadline_s": 2.0}))
    assert isinstance(outcome.result, DeadlineExceeded)
    assert outcome.took_s <= 2.0 + 1e-9
    assert len(said) >= 3
    assert all(left_ms <= (2.0 - now) * 1000 + 1 for now, left_ms in said)


def test_the_map_is_asked_of_another_node_when_the_first_is_stopped() -> None:
    world = World({**all_of(quick), N1: stopped()})
    world.router = Router([N1, N2], lambda: 0.0, world.policy)
    outcome = world.call(a_get())
    assert not isinstance(outcome.result, Exception)
    # The map's delay; n1 is known to be ill then, and is not asked for the answer.
    assert outcome.took_s <= world.policy.hedge_s_first + 3 * QUICK_S


def test_a_question_to_one_node_is_not_asked_of_another_however_slow_it_is() -> None:
    world = World({**all_of(quick), N2: stopped()})
    exchange = Exchange(calls.health(N2), world.router, 0.0)
    step = exchange.start(0.0)
    assert isinstance(step, Send) and step.patience_s == math.inf


def test_a_node_that_goes_on_is_asked_again_after_a_probe_and_no_call_paid_for_it() -> None:
    world = World({**all_of(quick), N1: stopped(0.0, 4.0)})
    world.call(a_get())
    while world.now < 20.0:
        world.now += 0.1
        outcome = world.call(a_get())
        assert outcome.took_s <= 2 * QUICK_S + 1e-9
        if outcome.asked == [N1]:
            break
    assert 4.0 <= world.now <= 4.0 + world.policy.breaker_s_max + 1.0
    waits = [at for at, url in world.probed if url == N1]
    assert len(waits) >= 2
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(waits))


def test_when_every_node_is_ill_the_one_that_answers_is_asked_before_the_silent_one() -> None:
    world = World({N1: stopped(), N2: lambda _s, _n: (0.01, refusal("shutting_down")), N3: quick})
    world.nodes[N3] = stopped()
    world.call(calls.search("tea", {"user_id": "ana", "deadline_s": 3.0}))
    assert all(world.router.is_ill(url) for url in (N1, N2, N3))
    assert world.router.candidates(a_get())[0] == N2


def test_a_node_that_shuts_down_is_left_at_once_and_no_request_waits() -> None:
    world = World({**all_of(quick), N1: lambda _s, _n: (0.001, refusal("shutting_down"))})
    for kind in (a_get, an_add, a_get):
        outcome = world.call(kind())
        assert not isinstance(outcome.result, Exception)
        assert outcome.took_s <= 0.02


BEHAVIOURS = st.one_of(
    st.floats(0.0005, 4.0).map(slow),
    st.tuples(st.floats(-1.0, 3.0), st.floats(0.0, 3.0)).map(
        lambda when: stopped(when[0], when[0] + when[1])
    ),
    st.sampled_from(
        ["shutting_down", "no_quorum", "not_leader", "overloaded", "deadline_exceeded"]
    ).map(lambda code: lambda _send, _now: (0.01, refusal(code))),
    st.sampled_from(list(Failure)).map(lambda why: lambda _send, _now: (0.01, why)),
    st.just(stopped()),
)


@given(st.tuples(BEHAVIOURS, BEHAVIOURS), st.integers(0, 2), st.integers(1, 8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_with_one_node_that_serves_every_call_succeeds_in_its_time(
    others: tuple[Node, Node], place: int, count: int, writes: bool
) -> None:
    behaviours = list(others)
    behaviours.insert(place, quick)
    world = World(dict(zip(URLS.values(), behaviours, strict=True)))
    for _ in range(3):
        for outcome in world.together([an_add() if writes else a_get() for _ in range(count)]):
            assert not isinstance(outcome.result, Exception), outcome
            assert outcome.took_s <= world.policy.deadline_s
            assert len(outcome.asked) <= 12


@given(st.tuples(BEHAVIOURS, BEHAVIOURS, BEHAVIOURS), st.floats(0.05, 6.0), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_the_nodes_do_a_call_ends_by_its_deadline(
    behaviours: tuple[Node, Node, Node], deadline_s: float, write: bool
) -> None:
    world = World(dict(zip(URLS.values(), behaviours, strict=True)))
    made = calls.add("tea", None, {"user_id": "ana", "deadline_s": deadline_s})
    if not write:
        made = calls.search("tea", {"user_id": "ana", "deadline_s": deadline_s})
    for outcome in world.together([made, made, made]):
        assert outcome.took_s <= deadline_s + 1e-6
