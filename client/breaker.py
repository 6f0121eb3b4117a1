"""The circuit breaker of one node: is it well, ill, or being asked whether it is well again?

    Closed --failures, or certainty--> Open --its time is up--> HalfOpen --probe answered--> Closed
                                         ^------------------------- probe failed, or got lost --'

An open breaker moves its node behind the others; it never makes a call fail by itself, because
where every node is ill, the least ill one is still worth asking. Whether a node is well again is
found out by a probe of its own, one at a time, so that no call pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from agentmem_client.policy import Policy


class Cause(Enum):
    """What opened a breaker: among ill nodes, one that at least answers is asked first."""

    REFUSING = "it answers, but does not serve"
    SILENT = "it does not answer"


@dataclass(frozen=True, slots=True)
class Closed:
    failures: int = 0  # since the last success


@dataclass(frozen=True, slots=True)
class Open:
    cause: Cause
    since: float
    probe_at: float
    trips: int  # in a row: each doubles the wait


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """One probe is under way. When `probe_ends_at` has passed without a word, it is lost."""

    cause: Cause
    since: float
    probe_ends_at: float
    trips: int


State = Closed | Open | HalfOpen


class Breaker:
    """`now`: seconds on any clock that never goes back."""

    __slots__ = ("_policy", "state")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.state: State = Closed()

    @property
    def is_closed(self) -> bool:
        return isinstance(self.state, Closed)

    @property
    def cause(self) -> Cause | None:
        return None if isinstance(self.state, Closed) else self.state.cause

    def succeeded(self, sent_at: float) -> None:
        """A request that was sent at `sent_at` was served.

        One that was sent before the breaker opened says nothing about the node since.
        """
        if isinstance(self.state, Closed) or sent_at >= self.state.since:
            self.state = Closed()

    def failed(self, now: float, cause: Cause, *, is_certain: bool) -> bool:
        """A request failed. True when this opened the breaker.

        `is_certain`: no further failure is needed to know that the node is ill.
        """
        state = self.state
        if not isinstance(state, Closed):
            return False  # requests from before it opened: the probe decides, not they
        failures = state.failures + 1
        if not is_certain and failures < self._policy.breaker_failures_max:
            self.state = Closed(failures)
            return False
        self.state = Open(cause, now, now + self._wait_s(1), 1)
        return True

    def take_probe(self, now: float) -> bool:
        """Whether the caller is to probe the node now, and report it by `probed`."""
        state = self.state
        due = (isinstance(state, Open) and now >= state.probe_at) or (
            isinstance(state, HalfOpen) and now >= state.probe_ends_at
        )
        if due:
            assert not isinstance(state, Closed)
            ends_at = now + 2 * self._policy.probe_s_max
            self.state = HalfOpen(state.cause, state.since, ends_at, state.trips)
        return due

    def probed(self, now: float, *, is_well: bool, cause: Cause) -> None:
        state = self.state
        if not isinstance(state, HalfOpen):
            return  # a call has found out meanwhile
        if is_well:
            self.state = Closed()
        else:
            trips = state.trips + 1
            self.state = Open(cause, now, now + self._wait_s(trips), trips)

    def _wait_s(self, trips: int) -> float:
        doubled = self._policy.breaker_s_first * 2.0 ** min(trips - 1, 32)
        return min(self._policy.breaker_s_max, doubled)
