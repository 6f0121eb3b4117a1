"""What keeps a client's second tries from making a bad moment worse: two budgets, shared by all
its calls. Retries answer failures, hedges answer slowness; neither pays for the other."""

from __future__ import annotations

import math

from agentmem_client.policy import Policy


class RetryBudget:
    """Tokens for retries: earned by successes, and a steady number a second."""

    __slots__ = ("_at", "_policy", "_tokens")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tokens = policy.retry_tokens_max
        self._at = 0.0

    def earn(self) -> None:
        """A call succeeded: it pays for a part of somebody's retry."""
        self._tokens = min(
            self._policy.retry_tokens_max, self._tokens + self._policy.retry_tokens_per_call
        )

    def spend(self, now: float) -> float:
        """Take one retry from the budget; returns the seconds until it is there.

        Who comes when the budget is spent waits behind those who came before: when a cluster
        is really down, thousands of callers retry at a steady rate, not in a storm.
        """
        elapsed = max(0.0, now - self._at)
        self._at = now
        self._tokens = min(
            self._policy.retry_tokens_max,
            self._tokens + elapsed * self._policy.retry_tokens_per_s,
        )
        self._tokens -= 1.0
        if self._tokens >= 0.0:
            return 0.0
        if self._policy.retry_tokens_per_s <= 0.0:
            return math.inf
        return -self._tokens / self._policy.retry_tokens_per_s

    def give_back(self) -> None:
        """A retry that was taken will not happen."""
        self._tokens += 1.0

    def spend_at_once(self, now: float) -> bool:
        """Take a retry if it is there now; else take nothing."""
        if self.spend(now) <= 0.0:
            return True
        self.give_back()
        return False


class HedgeBudget:
    """Tokens for hedges: a small share of every call, up to a burst."""

    __slots__ = ("_policy", "_tokens")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tokens = policy.hedge_burst

    def earn(self) -> None:
        """A call was started."""
        self._tokens = min(self._policy.hedge_burst, self._tokens + self._policy.hedge_share_max)

    def spend(self) -> bool:
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
