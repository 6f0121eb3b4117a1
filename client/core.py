"""The client's mind, without I/O: a call goes in, instructions come out.

    exchange = Exchange(call, router, now)      # now: seconds on any clock that never goes back
    exchange.start(now)                                      -> Send | Wait | Done | Fail
    exchange.answered(attempt, status, headers, body, now)   -> the next one
    exchange.failed(attempt, Failure.REFUSED, text, now)     -> the next one
    exchange.woke(now)                                       -> the next one

A driver obeys until `Done` or `Fail`, and then drops what is still on the wire. It has no choice
to make, which is why the blocking and the asyncio client cannot differ, and why the tests need
neither sockets nor sleeps.

The rules that are decided here:
- the leader of the owner's shard is asked first; ill nodes (`breaker`) come last;
- a call that has no answer after a hedge delay is asked of a second node too, and the first good
  answer counts; hedges have a budget. Where the first node is known to be ill by then, moving on
  is a retry and paid as one;
- `not_leader` with a leader named is followed at once, a few times; a node that failed is
  replaced at once by one that was not tried; every other retry backs off with jitter, and waits
  at least as long as the server's Retry-After;
- a write carries one idempotency key for its whole life, so sending it again, or to two nodes at
  once, is always safe;
- no attempt outlives the call's deadline, and one slow node may use a third of it at most;
- retries are paid from a budget that all calls of a client share, and wait for it when it is
  spent: when a cluster is really down, thousands of callers must not become a storm.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from agentmem_client.answers import (
    error_of,
    is_retryable,
    parsed,
    parsed_or_none,
    retry_after_s,
)
from agentmem_client.attempts import Attempt, Attempts
from agentmem_client.breaker import Cause
from agentmem_client.calls import Anywhere, Call, ToNode
from agentmem_client.calls import cluster as cluster_call
from agentmem_client.errors import (
    AgentMemError,
    ConnectionFailed,
    DeadlineExceeded,
    ProtocolError,
)
from agentmem_client.hedging import Hedging
from agentmem_client.instructions import Done, Fail, Failure, Instruction, Send, Wait
from agentmem_client.router import Router
from agentmem_client.topology import Topology

T = TypeVar("T")

_MAP_IS_STALE_CODES = frozenset({"not_leader", "wrong_shard", "map_moved"})
# These nodes answer, but cannot serve for a while: another is asked at once.
_NODE_IS_ILL_CODES = frozenset({"shutting_down", "no_quorum", "unavailable"})
_MAP_S_MAX = 2.0
_JITTER_MIN = 0.1


@dataclass(frozen=True, slots=True)
class _New:
    """Not started."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """Requests are on the wire: for the map, or for the answer of the call."""


@dataclass(frozen=True, slots=True)
class _BackingOff:
    """Waiting before the next attempt; what is on the wire still is not waited for."""

    until: float


@dataclass(frozen=True, slots=True)
class _Ended:
    """The result was given."""


_State = _New | _Asking | _BackingOff | _Ended


class Exchange(Generic[T]):
    """The life of one call, from the first byte to its result."""

    def __init__(self, call: Call[T], router: Router, now: float) -> None:
        self._call = call
        self._router = router
        self._policy = router.policy
        self._deadline_s = call.deadline_s if call.deadline_s is not None else self._default()
        self._started = now
        self._deadline = now + self._deadline_s
        self._state: _State = _New()
        numbers = itertools.count(1)
        self._calling = Attempts(numbers)
        self._mapping = Attempts(numbers)  # for the map; the two are never on the wire together
        self._hedging = Hedging(call, router)
        self._retries = 0
        self._redirects = 0
        self._next_url: str | None = None
        self._last_error: AgentMemError | None = None
        self._has_answer = False
        self._may_have_happened = False

    def _default(self) -> float:
        is_batch = self._call.name.endswith("_many")
        return self._policy.batch_deadline_s if is_batch else self._policy.deadline_s

    # -- events -------------------------------------------------------------------------

    def start(self, now: float) -> Instruction[T]:
        assert isinstance(self._state, _New)
        self._router.hedges.earn()
        return self._next_step(now)

    def answered(
        self, number: int, status: int, headers: Mapping[str, str], body: bytes, now: float
    ) -> Instruction[T]:
        attempt = self._on_the_wire().end(number)
        if attempt is None:
            return self._as_before(now)
        self._has_answer = True
        self._router.heard(attempt.url, now)
        if attempt.is_for_map:
            return self._map_answered(attempt, status, body, now)
        if 200 <= status < 300 or status in self._call.also_answers:
            self._router.served(attempt.url, attempt.sent_at)
            self._router.took(self._call, now - attempt.sent_at)
            return self._succeeded(status, body, now)
        return self._refused(attempt, status, headers, body, now)

    def failed(self, number: int, why: Failure, text: str, now: float) -> Instruction[T]:
        """No answer came. Every call may be sent again: reads by nature, writes by their key."""
        attempt = self._on_the_wire().end(number)
        if attempt is None:
            return self._as_before(now)
        self._last_error = _no_answer(attempt.url, why, text)
        is_silent = why is Failure.TIMED_OUT and self._router.is_silent(
            attempt.url, attempt.sent_at
        )
        is_certain = is_silent or why is Failure.REFUSED
        self._router.failed(attempt.url, now, Cause.SILENT, is_certain=is_certain)
        if attempt.is_for_map:
            return self._go_on(now) if self._mapping.under_way else self._next_step(now)
        self._router.map_is_stale = True
        if why is not Failure.REFUSED:
            self._may_have_happened = True
        if isinstance(self._call.route, ToNode):
            return self._fail(self._last_error)
        # Where nothing was sent, asking another node costs the cluster nothing more.
        return self._elsewhere(now, at_least_s=0.0, is_free=why is Failure.REFUSED)

    def woke(self, now: float) -> Instruction[T]:
        if isinstance(self._state, _BackingOff):
            self._mapping.tried.clear()
            if self._untried() is None:  # else it is another node's turn
                self._calling.tried.clear()
            return self._next_step(now)
        assert isinstance(self._state, _Asking)
        return self._hedged(now)

    # -- decisions ----------------------------------------------------------------------

    def _next_step(self, now: float) -> Instruction[T]:
        if now >= self._deadline:
            return self._out_of_time()
        if self._needs_map():
            url = self._map_source()
            if url is not None:
                return self._ask_for_map(url, now)
            if self._router.topology is None:
                return self._retry(now, at_least_s=0.0)
        if self._calling.count >= self._policy.attempts_max:
            return self._fail(self._last_error or self._timeout_error())
        url = self._next_url or self._best()
        self._next_url = None
        return self._send(url, now)

    def _best(self) -> str:
        """The node to ask now: one that was not asked in vain a moment ago, if there is one."""
        candidates = self._router.candidates(self._call)
        return self._untried() or candidates[0]

    def _untried(self) -> str | None:
        """The best node that is well and was not tried since the call last backed off."""
        for url in self._router.candidates(self._call):
            if url not in self._calling.tried and not self._router.is_ill(url):
                return url
        return None

    def _send(self, url: str, now: float) -> Instruction[T]:
        timeout_s = self._attempt_timeout(now)
        if timeout_s <= 0.0:
            return self._out_of_time()
        hedge_s = self._router.hedge_after(self._call)
        attempt = self._calling.begin(url, now, hedge_s, is_for_map=False)
        self._state = _Asking()
        return Send(
            attempt.number,
            self._call.method,
            url + self._call.path,
            self._headers(timeout_s),
            self._call.body,
            timeout_s,
            self._hedging.patience_s(self._calling, now),
        )

    def _needs_map(self) -> bool:
        if isinstance(self._call.route, ToNode) or self._call.name == "cluster":
            return False
        if self._router.topology is None:
            return True  # even for a call that any node answers: one must know the others to ask
        return self._router.map_is_stale and not isinstance(self._call.route, Anywhere)

    def _map_source(self) -> str | None:
        for url in self._router.candidates(cluster_call()):
            if url not in self._mapping.tried:
                if self._router.topology is not None and self._router.is_ill(url):
                    continue
                return url
        return None

    def _ask_for_map(self, url: str, now: float) -> Instruction[T]:
        self._state = _Asking()
        # Set here and not when the answer comes: of many calls that learn at once that the
        # map is stale, one fetches it and the others go on with what they have.
        self._router.map_is_stale = False
        timeout_s = min(self._attempt_timeout(now), _MAP_S_MAX)
        request = cluster_call()
        hedge_s = self._router.hedge_after(request)
        attempt = self._mapping.begin(url, now, hedge_s, is_for_map=True)
        return Send(
            attempt.number,
            request.method,
            url + request.path,
            self._common(timeout_s),
            None,
            timeout_s,
            self._hedging.patience_s(self._mapping, now),
        )

    def _map_answered(
        self, attempt: Attempt, status: int, body: bytes, now: float
    ) -> Instruction[T]:
        url = attempt.url
        try:
            if status == 200:
                self._router.learn(Topology.read(parsed(body)))
                self._router.served(url, attempt.sent_at)
                self._router.took(cluster_call(), now - attempt.sent_at)
                self._hedging.won(self._mapping, now)
                return self._next_step(now)
            error = error_of(status, parsed(body) if 400 <= status < 500 else None, url)
        except ProtocolError as not_ours:
            error = not_ours
        self._last_error = error
        if status in (401, 403):
            return self._fail(error)
        if not is_retryable(error.code, status) and self._router.topology is None:
            return self._fail(error)
        return self._go_on(now) if self._mapping.under_way else self._next_step(now)

    def _succeeded(self, status: int, body: bytes, now: float) -> Instruction[T]:
        self._router.retries.earn()
        self._hedging.won(self._calling, now)
        try:
            value = self._call.read(parsed(body) if status != 204 and body else {})
        except AgentMemError as error:
            return self._fail(error)
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            return self._fail(ProtocolError(f"The server's answer cannot be read: {wrong!r}."))
        if isinstance(value, Topology):
            self._router.learn(value)
        self._state = _Ended()
        return Done(value)

    def _refused(
        self, attempt: Attempt, status: int, headers: Mapping[str, str], body: bytes, now: float
    ) -> Instruction[T]:
        url = attempt.url
        answer = parsed_or_none(body)
        error = error_of(status, answer, url)
        code = str(answer.get("code", "")) if answer else ""
        self._last_error = error
        if not is_retryable(code, status) or isinstance(self._call.route, ToNode):
            self._router.served(url, attempt.sent_at)
            self._may_have_happened |= self._hedging.won(self._calling, now)
            return self._fail(error)
        if isinstance(error, DeadlineExceeded):
            self._may_have_happened = True
        if code in _MAP_IS_STALE_CODES:
            self._router.served(url, attempt.sent_at)
            leader = self._router.url_of(error.details.get("leader"))
            if (
                leader is not None
                and leader != url
                and not self._calling.is_asked(leader)
                and self._redirects < self._policy.redirects_max
            ):
                self._redirects += 1
                return self._send(leader, now)
            self._router.map_is_stale = True
        elif code in _NODE_IS_ILL_CODES:
            # Without a quorum may be one shard only: it takes several such to call the node ill.
            is_certain = code == "shutting_down"
            self._router.failed(url, now, Cause.REFUSING, is_certain=is_certain)
            self._router.map_is_stale = True
            return self._elsewhere(now, at_least_s=retry_after_s(headers), is_free=False)
        if self._calling.under_way:
            return self._go_on(now)
        return self._retry(now, at_least_s=retry_after_s(headers))

    def _elsewhere(self, now: float, at_least_s: float, *, is_free: bool) -> Instruction[T]:
        """One node failed: ask one that was not tried at once, if there is any; else back off."""
        if self._calling.under_way:
            return self._go_on(now)
        other = self._untried()
        if other is not None and (is_free or self._router.retries.spend_at_once(now)):
            self._next_url = other if not self._needs_map() else None
            return self._next_step(now)
        return self._retry(now, at_least_s)

    def _retry(self, now: float, at_least_s: float) -> Instruction[T]:
        queue_s = self._router.retries.spend(now)
        ceiling_s = min(
            self._policy.backoff_s_max,
            self._policy.backoff_s_first * 2 ** min(self._retries, 16),
        )
        self._retries += 1
        # Never nothing: a refused connection costs no time, so nothing else would end the loop.
        jitter = max(_JITTER_MIN, self._router.random())
        wait_s = max(at_least_s, queue_s, ceiling_s * jitter)
        left_s = self._deadline - now
        if not self._has_answer:
            left_s = min(left_s, self._started + self._policy.unreachable_s_max - now)
        if wait_s >= left_s:
            self._router.retries.give_back()
            return self._out_of_time()
        self._state = _BackingOff(now + wait_s)
        return Wait(wait_s)

    # -- hedging ------------------------------------------------------------------------

    def _on_the_wire(self) -> Attempts:
        return self._mapping if self._mapping.under_way else self._calling

    def _hedged(self, now: float) -> Instruction[T]:
        """Nothing came in time: ask a second node too, if there is one and it may be."""
        if now >= self._deadline:
            return self._out_of_time()
        attempts = self._on_the_wire()
        other = self._map_source() if attempts is self._mapping else self._untried()
        if other is None or not self._hedging.may_ask_another(attempts, now):
            return self._go_on(now)
        return (
            self._ask_for_map(other, now) if attempts is self._mapping else self._send(other, now)
        )

    def _go_on(self, now: float) -> Instruction[T]:
        """Wait for what is on the wire."""
        return Wait(self._hedging.patience_s(self._on_the_wire(), now))

    def _as_before(self, now: float) -> Instruction[T]:
        """Something came of a request that had lost its race: go on with what was going on."""
        if isinstance(self._state, _BackingOff):
            return Wait(max(0.0, self._state.until - now))
        return self._go_on(now)

    # -- requests -----------------------------------------------------------------------

    def _attempt_timeout(self, now: float) -> float:
        share_s = max(self._policy.attempt_s_min, self._deadline_s * self._policy.attempt_share_max)
        return min(self._deadline - now, share_s)

    def _common(self, timeout_s: float) -> dict[str, str]:
        headers = {
            "Accept": "application/json",
            # The server stops when nobody waits any more.
            "X-AgentMem-Deadline-Ms": str(max(1, int(timeout_s * 1000))),
        }
        if self._router.api_key:
            headers["Authorization"] = f"Bearer {self._router.api_key}"
        return headers

    def _headers(self, timeout_s: float) -> dict[str, str]:
        headers = self._common(timeout_s)
        if self._call.body is not None:
            headers["Content-Type"] = "application/json"
        if self._call.idempotency_key is not None:
            headers["Idempotency-Key"] = self._call.idempotency_key
        headers.update(self._call.headers)
        return headers

    # -- ends ---------------------------------------------------------------------------

    def _timeout_error(self) -> AgentMemError:
        return DeadlineExceeded(f"{self._call.name} had no answer within {self._deadline_s:g} s.")

    def _out_of_time(self) -> Instruction[T]:
        last = self._last_error
        if last is None:
            return self._fail(self._timeout_error())
        if isinstance(last, ConnectionFailed):
            return self._fail(last)
        kind = type(last)
        tries = f"{self._calling.count} attempts in {self._deadline_s:g} s"
        text = f"{last.message} (gave up after {tries})"
        return self._fail(kind(text, status=last.status, details=last.details))

    def _fail(self, error: AgentMemError) -> Instruction[T]:
        self._state = _Ended()
        # What is still on the wire is dropped, and may have its effect all the same.
        self._may_have_happened |= bool(self._calling.drop_all())
        error.idempotency_key = self._call.idempotency_key
        error.outcome_unknown = self._call.idempotency_key is not None and self._may_have_happened
        return Fail(error)


def _no_answer(url: str, why: Failure, text: str) -> AgentMemError:
    if why is Failure.TIMED_OUT:
        return DeadlineExceeded(f"{url} did not answer in time.")
    return ConnectionFailed(
        f"{url} cannot be reached: {text}.", details={"url": url, "failure": why.value}
    )
