"""When a call that waits is asked of one more node, and what a lost race says about a node."""

from __future__ import annotations

import math
from typing import Any

from agentmem_client.attempts import Attempt, Attempts
from agentmem_client.breaker import Cause
from agentmem_client.calls import Call, ToNode
from agentmem_client.calls import cluster as cluster_call
from agentmem_client.router import Router

# Requests of one call on the wire at once: the first, its hedge, and one more when of those two
# nodes one is known to be ill.
_AT_ONCE_MAX = 3
# Another call may find out that the node is ill for which this one waits: looked at so often.
_LOOK_S = 0.2
_LOOK_S_MIN = 0.001


class Hedging:
    """For one call."""

    __slots__ = ("_call", "_is_single", "_router")

    def __init__(self, call: Call[Any], router: Router) -> None:
        self._call = call
        self._router = router
        self._is_single = isinstance(call.route, ToNode)

    def may_ask_another(self, attempts: Attempts, now: float) -> bool:
        """Whether one more node is to be asked now. Pays for it from the budget that it costs."""
        router = self._router
        under_way = attempts.under_way.values()
        well = [attempt for attempt in under_way if not router.is_ill(attempt.url)]
        if self._is_single or len(well) > 1 or len(under_way) >= _AT_ONCE_MAX:
            return False
        if attempts.count >= router.policy.attempts_max:
            return False
        if not well:
            # Whom it was sent to is ill by now and does not work on it: this is no second
            # helping for a busy cluster, but a retry.
            return router.retries.spend_at_once(now)
        (waited_for,) = well
        if now < attempts.newest().hedge_at:
            return False
        if router.hedges.spend():
            return True
        # No budget: too much is slow. But a node that said nothing at all for as long as any
        # hedge would wait has stopped, and to leave it is no load for the others.
        if not self._has_stopped(waited_for, now):
            return False
        router.failed(waited_for.url, now, Cause.SILENT, is_certain=True)
        return router.retries.spend_at_once(now)

    def patience_s(self, attempts: Attempts, now: float) -> float:
        """Seconds until it is worth asking `may_ask_another` (again)."""
        if self._is_single:
            return math.inf
        left_s = attempts.newest().hedge_at - now
        return max(_LOOK_S_MIN, min(left_s, _LOOK_S)) if left_s > 0.0 else _LOOK_S

    def won(self, attempts: Attempts, now: float) -> bool:
        """An answer came: what else is on the wire has lost, and that says something of its node.

        Returns whether anything was on the wire still.
        """
        router = self._router
        lost = attempts.drop_all()
        for attempt in lost:
            if now < attempt.hedge_at:
                continue  # it had no time
            if router.is_silent(attempt.url, attempt.sent_at):
                router.failed(attempt.url, now, Cause.SILENT, is_certain=True)
            else:
                # It runs, and is slow. To remember the quick ones only would make the delay
                # shorter and shorter.
                call = cluster_call() if attempt.is_for_map else self._call
                router.took(call, now - attempt.sent_at)
        return bool(lost)

    def _has_stopped(self, attempt: Attempt, now: float) -> bool:
        router = self._router
        is_overdue = now - attempt.sent_at >= router.hedge_bounds(self._call).max_s
        return is_overdue and router.is_silent(attempt.url, attempt.sent_at)
