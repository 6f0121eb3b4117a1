"""The client's mind, without I/O: a call goes in, instructions come out.

    exchange = Exchange(call, router, now)      # now: seconds on any clock that never goes back
    exchange.start(now)                         -> Send | Wait | Done | Fail
    exchange.answered(status, headers, body, now)   -> the next one
    exchange.failed(Failure.REFUSED, text, now)     -> the next one
    exchange.woke(now)                              -> the next one

A driver obeys until `Done` or `Fail`. It has no choice to make, which is why the blocking
and the asyncio client cannot differ, and why the tests need neither sockets nor sleeps.

The rules that are decided here:
- the leader of the owner's shard is asked first; a node that just failed is avoided for a while;
- `not_leader` with a leader named is followed at once, a few times; every other retry backs off
  with jitter, and waits at least as long as the server's Retry-After;
- a write carries one idempotency key for its whole life, so sending it again is always safe;
- no attempt outlives the call's deadline, and one slow node may use a third of it at most;
- retries are paid from a budget that all calls of a client share, and wait for it when it is
  spent: when a cluster is really down, thousands of callers must not become a storm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from agentmem_client.answers import (
    error_of,
    is_retryable,
    parsed,
    parsed_or_none,
    retry_after_s,
)
from agentmem_client.calls import Anywhere, Call, ToNode
from agentmem_client.calls import cluster as cluster_call
from agentmem_client.errors import (
    AgentMemError,
    ConnectionFailed,
    DeadlineExceeded,
    ProtocolError,
)
from agentmem_client.router import Router
from agentmem_client.topology import Topology

T = TypeVar("T")

_MAP_IS_STALE_CODES = frozenset({"not_leader", "wrong_shard"})
# These nodes answer, but cannot serve for a while: another is asked first.
_NODE_IS_ILL_CODES = frozenset({"shutting_down", "no_quorum", "unavailable"})
_MAP_S_MAX = 2.0
_JITTER_MIN = 0.1


class Failure(Enum):
    """Why an attempt has no answer."""

    REFUSED = "refused"  # no connection: the request was certainly not sent
    BROKEN = "broken"  # the connection broke: a write may have happened
    TIMED_OUT = "timed out"  # no answer in time: a write may have happened


@dataclass(frozen=True, slots=True)
class Send:
    """Send this request and report what comes of it, giving up after `timeout_s`."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class Fail:
    error: AgentMemError


Instruction = Send | Wait | Done[T] | Fail


@dataclass(frozen=True, slots=True)
class _New:
    """Not started."""


@dataclass(frozen=True, slots=True)
class _FetchingMap:
    url: str


@dataclass(frozen=True, slots=True)
class _Asking:
    url: str


@dataclass(frozen=True, slots=True)
class _BackingOff:
    """Waiting before the next attempt."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """The result was given."""


_State = _New | _FetchingMap | _Asking | _BackingOff | _Ended


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
        self._attempts = 0
        self._retries = 0
        self._redirects = 0
        self._map_tried: set[str] = set()
        self._tried: set[str] = set()
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
        return self._next_step(now)

    def answered(
        self, status: int, headers: Mapping[str, str], body: bytes, now: float
    ) -> Instruction[T]:
        state = self._state
        if isinstance(state, _FetchingMap):
            self._has_answer = True
            return self._map_answered(state.url, status, body, now)
        assert isinstance(state, _Asking)
        self._has_answer = True
        self._router.well(state.url)
        if 200 <= status < 300 or status in self._call.also_answers:
            return self._succeeded(status, body)
        return self._refused(state.url, status, headers, body, now)

    def failed(self, why: Failure, text: str, now: float) -> Instruction[T]:
        """No answer came. Every call may be sent again: reads by nature, writes by their key."""
        state = self._state
        if isinstance(state, _FetchingMap):
            self._map_tried.add(state.url)
            self._router.avoid(state.url, now)
            self._last_error = _no_answer(state.url, why, text)
            return self._next_step(now)
        assert isinstance(state, _Asking)
        self._router.avoid(state.url, now)
        self._router.map_is_stale = True
        self._last_error = _no_answer(state.url, why, text)
        if why is not Failure.REFUSED:
            self._may_have_happened = True
        if isinstance(self._call.route, ToNode):
            return self._fail(self._last_error)
        untried = [
            url
            for url in self._router.candidates(self._call, now)
            if url not in self._tried and not self._router.is_avoided(url, now)
        ]
        if why is Failure.REFUSED and untried:
            # Nothing was sent and another node is known: waiting would help nobody.
            self._next_url = untried[0]
            return self._next_step(now)
        return self._retry(now, at_least_s=0.0)

    def woke(self, now: float) -> Instruction[T]:
        assert isinstance(self._state, _BackingOff)
        self._tried.clear()
        self._map_tried.clear()
        return self._next_step(now)

    # -- decisions ----------------------------------------------------------------------

    def _next_step(self, now: float) -> Instruction[T]:
        left_s = self._deadline - now
        if left_s <= 0:
            return self._out_of_time()
        if self._needs_map():
            url = self._map_source(now)
            if url is not None:
                return self._ask_for_map(url, left_s)
            if self._router.topology is None:
                return self._retry(now, at_least_s=0.0)
        if self._attempts >= self._policy.attempts_max:
            return self._fail(self._last_error or self._timeout_error())
        url = self._next_url or self._router.candidates(self._call, now)[0]
        self._next_url = None
        self._attempts += 1
        self._tried.add(url)
        self._state = _Asking(url)
        timeout_s = self._attempt_timeout(left_s)
        return Send(
            self._call.method,
            url + self._call.path,
            self._headers(timeout_s),
            self._call.body,
            timeout_s,
        )

    def _needs_map(self) -> bool:
        if isinstance(self._call.route, ToNode) or self._call.name == "cluster":
            return False
        if self._router.topology is None:
            return True  # even for a call that any node answers: one must know the others to ask
        return self._router.map_is_stale and not isinstance(self._call.route, Anywhere)

    def _map_source(self, now: float) -> str | None:
        for url in self._router.candidates(cluster_call(), now):
            if url not in self._map_tried:
                if self._router.topology is not None and self._router.is_avoided(url, now):
                    continue
                return url
        return None

    def _ask_for_map(self, url: str, left_s: float) -> Instruction[T]:
        self._state = _FetchingMap(url)
        # Set here and not when the answer comes: of many calls that learn at once that the
        # map is stale, one fetches it and the others go on with what they have.
        self._router.map_is_stale = False
        timeout_s = min(self._attempt_timeout(left_s), _MAP_S_MAX)
        request = cluster_call()
        return Send(request.method, url + request.path, self._common(timeout_s), None, timeout_s)

    def _map_answered(self, url: str, status: int, body: bytes, now: float) -> Instruction[T]:
        self._map_tried.add(url)
        try:
            if status == 200:
                self._router.learn(Topology.read(parsed(body)))
                self._router.well(url)
                return self._next_step(now)
            error = error_of(status, parsed(body) if 400 <= status < 500 else None, url)
        except ProtocolError as not_ours:
            error = not_ours
        self._last_error = error
        if status in (401, 403):
            return self._fail(error)
        if not is_retryable(error.code, status) and self._router.topology is None:
            return self._fail(error)
        return self._next_step(now)

    def _succeeded(self, status: int, body: bytes) -> Instruction[T]:
        self._router.earn()
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
        self, url: str, status: int, headers: Mapping[str, str], body: bytes, now: float
    ) -> Instruction[T]:
        answer = parsed_or_none(body)
        error = error_of(status, answer, url)
        code = str(answer.get("code", "")) if answer else ""
        self._last_error = error
        if not is_retryable(code, status) or isinstance(self._call.route, ToNode):
            return self._fail(error)
        if isinstance(error, DeadlineExceeded):
            self._may_have_happened = True
        if code in _MAP_IS_STALE_CODES:
            leader = self._router.url_of(error.details.get("leader"))
            if (
                leader is not None
                and leader != url
                and self._redirects < self._policy.redirects_max
            ):
                self._redirects += 1
                self._next_url = leader
                return self._next_step(now)
            self._router.map_is_stale = True
        elif code in _NODE_IS_ILL_CODES:
            self._router.avoid(url, now)
            self._router.map_is_stale = True
        return self._retry(now, at_least_s=retry_after_s(headers))

    def _retry(self, now: float, at_least_s: float) -> Instruction[T]:
        queue_s = self._router.spend_retry(now)
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
            self._router.give_back_retry()
            return self._out_of_time()
        self._state = _BackingOff()
        return Wait(wait_s)

    def _attempt_timeout(self, left_s: float) -> float:
        share_s = max(self._policy.attempt_s_min, self._deadline_s * self._policy.attempt_share_max)
        return min(left_s, share_s)

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
        text = f"{last.message} (gave up after {self._attempts} attempts in {self._deadline_s:g} s)"
        return self._fail(kind(text, status=last.status, details=last.details))

    def _fail(self, error: AgentMemError) -> Instruction[T]:
        self._state = _Ended()
        error.idempotency_key = self._call.idempotency_key
        error.outcome_unknown = self._call.idempotency_key is not None and self._may_have_happened
        return Fail(error)


def _no_answer(url: str, why: Failure, text: str) -> AgentMemError:
    if why is Failure.TIMED_OUT:
        return DeadlineExceeded(f"{url} did not answer in time.")
    return ConnectionFailed(
        f"{url} cannot be reached: {text}.", details={"url": url, "failure": why.value}
    )
