"""The client's decisions, told as stories: an event in, an instruction out; no socket, no sleep."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_client import (
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    DiskFull,
    NoQuorum,
    NotFound,
    Policy,
    ProtocolError,
    Unauthorized,
    calls,
)
from agentmem_client.breaker import Cause
from agentmem_client.core import Exchange
from agentmem_client.instructions import Done, Fail, Failure, Send, Wait
from agentmem_client.router import Router
from agentmem_client.topology import Topology

A, B, C = "http://a", "http://b", "http://c"


class OneAtATime:
    """An exchange whose every request is answered, or fails, before it thinks of a hedge."""

    def __init__(self, call: calls.Call[Any], router: Router, now: float) -> None:
        self._exchange = Exchange(call, router, now)
        self._attempt = 0

    def _noted(self, step: Any) -> Any:
        if isinstance(step, Send):
            self._attempt = step.attempt
        return step

    def start(self, now: float) -> Any:
        return self._noted(self._exchange.start(now))

    def woke(self, now: float) -> Any:
        return self._noted(self._exchange.woke(now))

    def answered(self, status: int, headers: dict[str, str], body: bytes, now: float) -> Any:
        return self._noted(self._exchange.answered(self._attempt, status, headers, body, now))

    def failed(self, why: Failure, text: str, now: float) -> Any:
        return self._noted(self._exchange.failed(self._attempt, why, text, now))


def a_map(leader: str | None = "n1", version: int = 1) -> dict[str, Any]:
    return {
        "version": version,
        "tenant": "default",
        "nodes": {"n1": {"http": A}, "n2": {"http": B}, "n3": {"http": C}},
        "shards": {
            "s00": {
                "epoch": 1,
                "members": ["n1", "n2", "n3"],
                "leader": leader,
                "slots": [[0, 16_384]],
            }
        },
    }


def a_router(leader: str | None = "n1", **policy: Any) -> Router:
    router = Router([A], lambda: 0.5, Policy(**policy))
    router.learn(Topology.read(a_map(leader)))
    return router


def an_add(**options: Any) -> calls.Call[Any]:
    return calls.add("tea", None, {"user_id": "ana", **options})


def body(code: str, **details: Any) -> bytes:
    return json.dumps({"code": code, "detail": f"{code}!", "details": details}).encode()


STORED = json.dumps({"results": [], "token": ""}).encode()


def sent(step: Any) -> Send:
    assert isinstance(step, Send), step
    return step


def failed(step: Any) -> BaseException:
    assert isinstance(step, Fail), step
    return step.error


def test_a_request_for_an_owner_goes_to_the_leader_of_its_shard() -> None:
    assert sent(OneAtATime(an_add(), a_router("n2"), 0.0).start(0.0)).url == f"{B}/api/v1/memories"


def test_the_map_is_fetched_before_the_first_request_and_the_next_call_needs_none() -> None:
    router = Router([A], lambda: 0.0)
    one = OneAtATime(an_add(), router, 0.0)
    assert sent(one.start(0.0)).url == f"{A}/api/v1/cluster"
    step = one.answered(200, {}, json.dumps(a_map("n3")).encode(), 0.1)
    assert sent(step).url.startswith(C)
    assert isinstance(one.answered(200, {}, STORED, 0.2), Done)
    assert sent(OneAtATime(an_add(), router, 1.0).start(1.0)).url.startswith(C)


def test_a_leader_that_the_answer_names_is_asked_at_once() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    one.start(0.0)
    assert sent(one.answered(503, {}, body("not_leader", leader="n3"), 0.1)).url.startswith(C)


def test_redirects_end_although_two_nodes_name_each_other() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    step: Any = one.start(0.0)
    hops = 0
    while isinstance(step, Send):
        hops += 1
        other = "n2" if step.url.startswith(A) else "n1"
        step = one.answered(503, {}, body("not_leader", leader=other), 0.1)
        assert hops < 10
    assert isinstance(step, Wait)


def test_without_a_leader_the_client_backs_off_and_fetches_the_map_again() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    one.start(0.0)
    step = one.answered(503, {"Retry-After": "0.1"}, body("not_leader"), 0.1)
    assert isinstance(step, Wait) and step.seconds >= 0.1
    assert sent(one.woke(0.3)).url.endswith("/cluster")


def test_a_refused_connection_is_answered_by_another_node_without_waiting() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    one.start(0.0)
    step = sent(one.failed(Failure.REFUSED, "Connection refused", 0.1))
    # The map is stale now, so it is fetched, from a node that is not the dead one.
    assert not step.url.startswith(A)
    assert step.url.endswith("/cluster")
    step = sent(one.answered(200, {}, json.dumps(a_map("n2")).encode(), 0.2))
    assert step.url == f"{B}/api/v1/memories"


def test_every_attempt_of_a_write_carries_the_same_key() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    keys = [sent(one.start(0.0)).headers["Idempotency-Key"]]
    step: Any = one.failed(Failure.TIMED_OUT, "", 1.0)
    now = 1.0
    for _ in range(6):
        if isinstance(step, Wait):
            now += step.seconds
            step = one.woke(now)
        elif step.url.endswith("/cluster"):
            step = one.answered(200, {}, json.dumps(a_map("n2")).encode(), now)
        else:
            keys.append(step.headers["Idempotency-Key"])
            step = one.answered(503, {}, body("unavailable"), now)
    assert len(keys) > 2
    assert len(set(keys)) == 1


def test_two_calls_have_different_keys() -> None:
    assert an_add().idempotency_key != an_add().idempotency_key


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(404, "not_found", NotFound), (409, "conflict", Conflict), (503, "disk_full", DiskFull)],
)
def test_what_asking_again_cannot_mend_is_said_at_once(
    status: int, code: str, kind: type[Exception]
) -> None:
    one = OneAtATime(an_add(), a_router(), 0.0)
    one.start(0.0)
    assert isinstance(failed(one.answered(status, {}, body(code), 0.1)), kind)


def test_a_proxys_bad_gateway_without_a_code_is_retried() -> None:
    one = OneAtATime(an_add(), a_router(), 0.0)
    one.start(0.0)
    assert isinstance(one.answered(502, {}, b"<html>", 0.1), Wait)


def test_a_server_bug_is_not_retried() -> None:
    one = OneAtATime(an_add(), a_router(), 0.0)
    one.start(0.0)
    assert isinstance(one.answered(500, {}, body("internal"), 0.1), Fail)


def test_no_attempt_outlives_the_deadline_and_one_node_gets_a_third_of_it() -> None:
    one = OneAtATime(an_add(deadline_s=9.0), a_router(), 0.0)
    assert sent(one.start(0.0)).timeout_s == 3.0
    for now in (7.0, 8.0, 8.5):
        step = sent(one.failed(Failure.TIMED_OUT, "", now))
        assert step.timeout_s <= 9.0 - now
        # What the node is told is what is left, and not what the call began with.
        assert int(step.headers["X-AgentMem-Deadline-Ms"]) <= (9.0 - now) * 1000


def test_a_write_that_timed_out_and_was_then_refused_says_that_its_outcome_is_unknown() -> None:
    one = OneAtATime(an_add(deadline_s=2.0), a_router(), 0.0)
    one.start(0.0)
    step: Any = one.failed(Failure.BROKEN, "reset", 0.5)
    now = 0.5
    while not isinstance(step, Fail):
        if isinstance(step, Wait):
            now += step.seconds
            step = one.woke(now)
        elif step.url.endswith("/cluster"):
            step = one.answered(200, {}, json.dumps(a_map("n2")).encode(), now)
        else:
            now += 0.1
            step = one.answered(503, {}, body("no_quorum"), now)
    assert isinstance(step.error, NoQuorum)
    assert step.error.outcome_unknown
    assert step.error.idempotency_key


def test_a_write_that_never_left_did_not_happen() -> None:
    one = OneAtATime(an_add(deadline_s=1.0), Router([A], lambda: 0.5), 0.0)
    step: Any = one.start(0.0)
    now = 0.0
    while not isinstance(step, Fail):
        if isinstance(step, Wait):
            now += step.seconds
            step = one.woke(now)
        else:
            step = one.failed(Failure.REFUSED, "Connection refused", now)
    assert isinstance(step.error, ConnectionFailed)
    assert not step.error.outcome_unknown


def test_when_nothing_ever_answered_patience_is_shorter_than_the_deadline() -> None:
    one = OneAtATime(an_add(), Router([A], lambda: 0.5, Policy(unreachable_s_max=0.2)), 0.0)
    step: Any = one.start(0.0)
    now = 0.0
    while not isinstance(step, Fail):
        if isinstance(step, Wait):
            now += step.seconds
            step = one.woke(now)
        else:
            step = one.failed(Failure.REFUSED, "Connection refused", now)
    assert now <= 0.2


def test_a_call_ends_by_its_deadline_whatever_the_cluster_does() -> None:
    one = OneAtATime(an_add(), a_router("n1"), 0.0)
    step: Any = one.start(0.0)
    now, steps = 0.0, 0
    while not isinstance(step, Fail):
        steps += 1
        assert steps < 500
        if isinstance(step, Wait):
            now += step.seconds
            step = one.woke(now)
        elif step.url.endswith("/cluster"):
            step = one.answered(503, {}, body("unavailable"), now)
        else:
            now += step.timeout_s
            step = one.failed(Failure.TIMED_OUT, "", now)
    assert now <= 10.0 + 1e-9
    assert isinstance(step.error, DeadlineExceeded)


def test_when_the_retry_budget_is_spent_callers_queue_instead_of_making_a_storm() -> None:
    router = a_router(retry_tokens_max=3.0, retry_tokens_per_s=10.0, retry_tokens_per_call=0.0)
    waits = []
    for _ in range(13):
        one = OneAtATime(an_add(), router, 0.0)
        one.start(0.0)
        step = one.answered(429, {}, body("overloaded"), 0.0)
        assert isinstance(step, Wait)
        waits.append(step.seconds)
    # Three at once, the others at ten a second: the last one second later.
    assert waits[-1] == pytest.approx(1.0)
    assert waits == sorted(waits)


def test_a_retry_that_would_come_after_the_deadline_is_not_waited_for_nor_paid() -> None:
    router = a_router(retry_tokens_max=1.0, retry_tokens_per_s=0.0, retry_tokens_per_call=0.0)
    for expected in (Wait, Fail, Fail):
        one = OneAtATime(an_add(), router, 0.0)
        one.start(0.0)
        assert isinstance(one.answered(429, {}, body("overloaded"), 0.0), expected)


def test_the_servers_retry_after_is_kept() -> None:
    one = OneAtATime(an_add(), a_router(), 0.0)
    one.start(0.0)
    step = one.answered(429, {"retry-after": "2.5"}, body("overloaded"), 0.0)
    assert isinstance(step, Wait) and step.seconds >= 2.5


def test_an_older_map_that_comes_late_is_not_taken() -> None:
    router = a_router()
    router.learn(Topology.read(a_map("n2", version=5)))
    router.learn(Topology.read(a_map("n3", version=4)))
    assert sent(OneAtATime(an_add(), router, 0.0).start(0.0)).url.startswith(B)


def test_a_node_that_is_ill_is_asked_last_until_a_probe_finds_it_well() -> None:
    router = a_router("n1")
    router.failed(A, 0.0, Cause.SILENT, is_certain=True)
    router.map_is_stale = False
    assert not sent(OneAtATime(an_add(), router, 99.0).start(99.0)).url.startswith(A)
    assert router.probes_due(99.0) == [A]
    router.probed(A, 99.1, 200)
    router.map_is_stale = False
    assert sent(OneAtATime(an_add(), router, 99.2).start(99.2)).url.startswith(A)


def test_a_node_that_left_the_map_is_not_probed_any_more() -> None:
    router = a_router("n1")
    router.failed(B, 0.0, Cause.SILENT, is_certain=True)
    assert router.probes_due(9.0) == [B]
    moved = a_map("n1", version=2)
    moved["nodes"]["n2"] = {"http": "http://elsewhere"}
    router.learn(Topology.read(moved))
    router.probed(B, 9.5, None)  # the probe that was under way comes back
    assert not router.has_ill
    assert router.probes_due(99.0) == []


def test_a_web_page_in_place_of_a_node_is_named_as_such() -> None:
    one = OneAtATime(an_add(), Router([A], lambda: 0.0), 0.0)
    one.start(0.0)
    assert isinstance(failed(one.answered(200, {}, b"<html>", 0.1)), ProtocolError)
    one = OneAtATime(an_add(), Router([A], lambda: 0.0), 0.0)
    one.start(0.0)
    assert isinstance(failed(one.answered(404, {}, b"<html>", 0.1)), ProtocolError)


def test_a_wrong_key_is_reported_and_not_tried_on_every_node() -> None:
    one = OneAtATime(an_add(), Router([A, B, C], lambda: 0.0), 0.0)
    one.start(0.0)
    assert isinstance(failed(one.answered(401, {}, body("unauthorized"), 0.1)), Unauthorized)


def test_a_question_to_one_node_is_asked_once_and_of_no_other() -> None:
    one = OneAtATime(calls.health(B), a_router("n1"), 0.0)
    assert sent(one.start(0.0)).url == f"{B}/health/ready"
    assert isinstance(failed(one.failed(Failure.REFUSED, "refused", 0.1)), ConnectionFailed)
    one = OneAtATime(calls.health(B), a_router("n1"), 0.0)
    one.start(0.0)
    step = one.answered(503, {}, b'{"ready": false}', 0.1)
    assert isinstance(step, Done) and not step.value.is_ready


def test_a_query_without_a_user_may_go_to_any_node_and_one_with_goes_to_its_shard() -> None:
    assert isinstance(calls.search("tea", {"agent_id": "planner"}).route, calls.Anywhere)
    assert calls.search("tea", {"user_id": "ana"}).route == calls.ToOwner("user:ana")
    assert calls.add("tea", None, {"agent_id": "p"}).route == calls.ToOwner("agent:p")


EVENTS = st.one_of(
    st.tuples(st.just("fail"), st.sampled_from(list(Failure)), st.floats(0.0, 1.0)),
    st.tuples(
        st.just("answer"),
        st.sampled_from(
            [
                (200, b"<html>"),
                (200, json.dumps(a_map("n2", 2)).encode()),
                (200, json.dumps(a_map(None, 3)).encode()),
                (503, body("not_leader")),
                (503, body("not_leader", leader="n3")),
                (503, body("wrong_shard")),
                (503, body("no_quorum")),
                (503, body("shutting_down")),
                (504, body("deadline_exceeded")),
                (429, body("overloaded")),
                (502, b""),
                (503, b"\xff"),
            ]
        ),
        st.floats(0.0, 1.0),
    ),
)


@given(
    st.lists(EVENTS, min_size=1, max_size=80),
    st.booleans(),
    st.floats(0.0, 0.999),
    st.floats(0.05, 12.0),
)
def test_whatever_happens_a_call_ends_in_time_under_one_key(
    events: list[Any], knows_map: bool, luck: float, deadline_s: float
) -> None:
    router = Router([A, B], lambda: luck)
    if knows_map:
        router.learn(Topology.read(a_map()))
    one = OneAtATime(an_add(deadline_s=deadline_s), router, 100.0)
    now, step, keys, sends = 100.0, one.start(100.0), set(), 0
    while not isinstance(step, Done | Fail):
        if isinstance(step, Wait):
            assert step.seconds >= 0.0
            now += step.seconds
            step = one.woke(now)
            continue
        sends += 1
        # A driver keeps its promise: no attempt takes longer than its timeout.
        assert 0.0 < step.timeout_s <= 100.0 + deadline_s - now + 1e-9
        if "Idempotency-Key" in step.headers:
            keys.add(step.headers["Idempotency-Key"])
        kind, what, share = events[sends % len(events)]
        now += step.timeout_s * share
        if kind == "fail":
            step = one.failed(what, "text", now)
        else:
            step = one.answered(what[0], {}, what[1], now)
        assert sends < 1_000
    assert now <= 100.0 + deadline_s + 1e-6
    assert len(keys) <= 1


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_to_listen_on_is_none_to_call(host: str) -> None:
    view = a_map("n1")
    view["nodes"] = {"n1": {"http": f"http://{host}:7700"}, "n2": {"http": B}}
    assert Topology.read(view).urls == {"n2": B}
