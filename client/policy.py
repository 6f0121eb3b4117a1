"""How long, how often and how much: every figure of the client's decisions, explained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, unless the name says otherwise. The defaults suit a cluster in one network."""

    deadline_s: float = 10.0
    batch_deadline_s: float = 60.0
    # One node that hangs may use this share of a call's deadline, so that others get a turn.
    attempt_share_max: float = 1 / 3
    attempt_s_min: float = 0.5

    # -- retries: what was refused, or broke --
    backoff_s_first: float = 0.05
    backoff_s_max: float = 1.0
    redirects_max: int = 3
    attempts_max: int = 64
    # When not one node has answered, how long to go on trying; the deadline, if that is sooner.
    unreachable_s_max: float = math.inf
    retry_tokens_max: float = 500.0
    retry_tokens_per_s: float = 100.0
    retry_tokens_per_call: float = 0.2

    # -- hedges: what is merely slow is asked of a second node too --
    # After the time in which this share of the recent calls of the kind was answered...
    hedge_quantile: float = 0.98
    # ...but within these bounds; `first` holds until a few calls were measured. Under the lower
    # bound lie pauses that every node makes; the upper one is what a dead node may cost.
    hedge_s_first: float = 0.2
    hedge_s_min: float = 0.03
    hedge_s_max: float = 1.0
    # A write waits for a sync on two disks, and perhaps for an embedding.
    hedge_write_s_first: float = 0.6
    hedge_write_s_min: float = 0.25
    hedge_write_s_max: float = 1.5
    # A batch is heavy: doing it twice must be the exception.
    hedge_batch_s_first: float = 10.0
    hedge_batch_s_min: float = 2.0
    hedge_batch_s_max: float = 15.0
    # At most this share of the calls, after a burst, so that a cluster that is slow because it
    # has too much to do is not given twice as much. 0 and 0: never.
    hedge_share_max: float = 0.05
    hedge_burst: float = 10.0

    # -- the circuit breaker of each node --
    # So many failures without a success in between open it. A refused connection, or silence
    # while another node answered, opens it at once.
    breaker_failures_max: int = 3
    # An open one is probed after this; each probe that fails doubles the wait.
    breaker_s_first: float = 0.5
    breaker_s_max: float = 5.0
    probe_s_max: float = 1.0

    answer_bytes_max: int = 256 * 1024 * 1024
