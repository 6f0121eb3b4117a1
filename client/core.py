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
  with full jitter, and waits at least as long as the server's Retry-After;
- a write carries one idempotency key for its whole life, so sending it again is always safe;
- no attempt outlives the call's deadline, and one slow node may use a third of it at most;
- retries are paid from a budget that all calls of a client share: when a cluster is really
  down, thousands of callers must not become a storm of retries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from agentmem_client.calls import Anywhere, Call
from agentmem_client.calls import cluster as cluster_call
from agentmem_client.errors import (
    AgentMemError,
    ConnectionFailed,
    DeadlineExceeded,
    ProtocolError,
    error_class,
)
from agentmem_client.topology import Topology

T = TypeVar("T")

_RETRYABLE_CODES = frozenset(
    {
        "overloaded",
        "unavailable",
        "not_leader",
        "wrong_shard",
        "no_quorum",
        "shutting_down",
        "deadline_exceeded",
    }
)
# Answers that come from something in front of a node, without a code of ours.
_RETRYABLE_STATUSES = frozenset({429, 502, 503, 504})
# A full disk or a missing model does not mend within a call: say so at once.
_MAP_IS_STALE_CODES = frozenset({"not_leader", "wrong_shard"})


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless the name says otherwise."""

    deadline_s: float = 10.0
    batch_deadline_s: float = 60.0
    attempt_share_max: float = 1 / 3
    attempt_s_min: float = 0.5
    backoff_s_first: float = 0.05
    backoff_s_max: float = 1.0
    redirects_max: int = 3
    attempts_max: int = 64
    avoid_s: float = 1.0
    retry_tokens_max: float = 500.0
    retry_tokens_per_s: float = 50.0
    retry_tokens_per_call: float = 0.2
    answer_bytes_max: int = 256 * 1024 * 1024


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


@dataclass(slots=True)
class Router:
    """What every call of a client shares: the map, who is ill, and the retry budget."""

    seeds: Sequence[str]
    random: Callable[[], float]
    policy: Policy = field(default_factory=Policy)
    api_key: str | None = None
    topology: Topology | None = None
    map_is_stale: bool = False
    _avoid_until: dict[str, float] = field(default_factory=dict)
    _retry_tokens: float = -1.0
    _tokens_at: float = 0.0

    def __post_init__(self) -> None:
        self._retry_tokens = self.policy.retry_tokens_max

    def learn(self, topology: Topology) -> None:
        """Take a map unless an older one came late. Same version: leaders may have moved."""
        if self.topology is None or topology.version >= self.topology.version:
            self.topology = topology
            self.map_is_stale = False

    def url_of(self, node: str | None) -> str | None:
        if node is None or self.topology is None:
            return None
        return self.topology.urls.get(node)

    def candidates(self, call: Call[Any], now: float) -> list[str]:
        """Every node's URL, best first: leader, members of the shard, the rest; the ill ones last.

        >>> Router(["http://a", "http://b"], lambda: 0.0).candidates(cluster_call(), 0.0)
        ['http://a', 'http://b']
        """
        topology = self.topology
        ordered: list[str] = []
        if topology is not None:
            shard = None if isinstance(call.route, Anywhere) else call.route.shard(topology)
            if shard is not None:
                names = [shard.leader, *shard.members] if shard.leader else list(shard.members)
                ordered += [topology.urls[name] for name in names if name in topology.urls]
            rest = list(topology.urls.values())
            # Calls that any node may answer are spread over the nodes.
            turn = int(self.random() * len(rest)) if rest and shard is None else 0
            ordered += rest[turn:] + rest[:turn]
        ordered += self.seeds
        unique = list(dict.fromkeys(ordered))
        return sorted(unique, key=lambda url: self._avoid_until.get(url, 0.0) > now)

    def avoid(self, url: str, now: float) -> None:
        self._avoid_until[url] = now + self.policy.avoid_s

    def is_avoided(self, url: str, now: float) -> bool:
        return self._avoid_until.get(url, 0.0) > now

    def well(self, url: str) -> None:
        self._avoid_until.pop(url, None)

    def earn(self) -> None:
        self._retry_tokens = min(
            self.policy.retry_tokens_max, self._retry_tokens + self.policy.retry_tokens_per_call
        )

    def spend_retry(self, now: float) -> bool:
        """True when the budget had one retry left."""
        elapsed = max(0.0, now - self._tokens_at)
        self._tokens_at = now
        self._retry_tokens = min(
            self.policy.retry_tokens_max,
            self._retry_tokens + elapsed * self.policy.retry_tokens_per_s,
        )
        if self._retry_tokens < 1.0:
            return False
        self._retry_tokens -= 1.0
        return True


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
        self._deadline = now + self._deadline_s
        self._state: _State = _New()
        self._attempts = 0
        self._redirects = 0
        self._map_tried: set[str] = set()
        self._tried: set[str] = set()
        self._next_url: str | None = None
        self._last_error: AgentMemError | None = None

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
            return self._map_answered(state.url, status, body, now)
        assert isinstance(state, _Asking)
        self._router.well(state.url)
        if 200 <= status < 300:
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
        if isinstance(self._call.route, Anywhere) and self._router.topology is None:
            return False
        return self._router.topology is None or (
            self._router.map_is_stale and not isinstance(self._call.route, Anywhere)
        )

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
        timeout_s = min(self._attempt_timeout(left_s), 2.0)
        request = cluster_call()
        return Send(request.method, url + request.path, self._headers(timeout_s, False), None, timeout_s)

    def _map_answered(self, url: str, status: int, body: bytes, now: float) -> Instruction[T]:
        self._map_tried.add(url)
        try:
            if status == 200:
                self._router.learn(Topology.read(_parsed(body)))
                self._router.well(url)
                return self._next_step(now)
            error = _error_of(status, _parsed_or_none(body), url)
        except ProtocolError as not_ours:
            error = not_ours
        self._last_error = error
        if status in (401, 403):
            return self._fail(error)
        if not _is_retryable(error.code, status) and self._router.topology is None:
            return self._fail(error)
        return self._next_step(now)

    def _succeeded(self, status: int, body: bytes) -> Instruction[T]:
        self._router.earn()
        try:
            value = self._call.read(_parsed(body) if status != 204 and body else {})
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
        parsed = _parsed_or_none(body)
        error = _error_of(status, parsed, url)
        code = str(parsed.get("code", "")) if parsed else ""
        self._last_error = error
        if not _is_retryable(code, status):
            return self._fail(error)
        if code in _MAP_IS_STALE_CODES:
            leader = self._router.url_of(error.details.get("leader"))
            if leader is not None and leader != url and self._redirects < self._policy.redirects_max:
                self._redirects += 1
                self._next_url = leader
                return self._next_step(now)
            self._router.map_is_stale = True
        elif code in ("shutting_down", "no_quorum", "unavailable"):
            self._router.avoid(url, now)
            self._router.map_is_stale = True
        return self._retry(now, at_least_s=_retry_after_s(headers))

    def _retry(self, now: float, at_least_s: float) -> Instruction[T]:
        if not self._router.spend_retry(now):
            return self._fail(self._last_error or self._timeout_error())
        ceiling_s = min(
            self._policy.backoff_s_max,
            self._policy.backoff_s_first * 2 ** min(self._attempts, 16),
        )
        wait_s = max(at_least_s, ceiling_s * self._router.random())
        left_s = self._deadline - now
        if wait_s >= left_s:
            return self._out_of_time()
        self._state = _BackingOff()
        return Wait(wait_s)

    def _attempt_timeout(self, left_s: float) -> float:
        share_s = max(self._policy.attempt_s_min, self._deadline_s * self._policy.attempt_share_max)
        return min(left_s, share_s)

    def _headers(self, timeout_s: float, own: bool = True) -> dict[str, str]:
        headers = {
            "Accept": "application/json",
            # The server stops when nobody waits any more.
            "X-AgentMem-Deadline-Ms": str(max(1, int(timeout_s * 1000))),
        }
        if self._router.api_key:
            headers["Authorization"] = f"Bearer {self._router.api_key}"
        if own and self._call.body is not None:
            headers["Content-Type"] = "application/json"
        if own and self._call.idempotency_key is not None:
            headers["Idempotency-Key"] = self._call.idempotency_key
        if own:
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
        return Fail(error)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as wrong:
        raise ProtocolError("The answer is not JSON. Is the URL an AgentMem node's?") from wrong
    if not isinstance(value, dict):
        raise ProtocolError("The answer is not a JSON object. Is the URL an AgentMem node's?")
    return value


def _parsed_or_none(body: bytes) -> dict[str, Any] | None:
    try:
        return _parsed(body)
    except ProtocolError:
        return None


def _error_of(status: int, parsed: Mapping[str, Any] | None, url: str) -> AgentMemError:
    code = parsed.get("code") if parsed else None
    text = (parsed or {}).get("detail") or (parsed or {}).get("error")
    details = (parsed or {}).get("details")
    kind = error_class(str(code) if code else None, status)
    return kind(
        str(text) if text else f"{url} answered HTTP {status}.",
        status=status,
        details=details if isinstance(details, dict) else None,
    )


def _is_retryable(code: str, status: int) -> bool:
    if code in _RETRYABLE_CODES:
        return True
    known = code and error_class(code).code == code
    return not known and status in _RETRYABLE_STATUSES


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds; 0 when absent or a date. HTTP allows whole seconds only, servers say fractions too."""
    for name, value in headers.items():
        if name.lower() == "retry-after":
            try:
                return min(30.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 0.0


def _no_answer(url: str, why: Failure, text: str) -> AgentMemError:
    if why is Failure.TIMED_OUT:
        return DeadlineExceeded(f"{url} did not answer in time.")
    return ConnectionFailed(f"{url}: {text}", details={"url": url, "failure": why.value})
