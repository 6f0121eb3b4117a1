"""Figures of a run: how many operations, how fast, and how long until the next write."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from agentmem_chaos.runs.strikes import Struck
from agentmem_chaos.workloads.history import Op, Outcome
from agentmem_client import Topology

IDLE_S = 1.0
WRITES = frozenset({"add", "create", "write", "cas", "delete", "tick", "again"})


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of them do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    at = max(0, min(len(ordered) - 1, -(-int(share * 1_000) * len(ordered) // 1_000) - 1))
    return ordered[at]


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    rounded = [round(value, 4) for value in values]
    return {
        "count": len(rounded),
        "p50": percentile(rounded, 0.50),
        "p99": percentile(rounded, 0.99),
        "max": max(rounded, default=None),
    }


def next_writes_s(struck: Sequence[Struck], ops: Sequence[Op]) -> list[float]:
    """For each fault and each shard that a victim led: the seconds from the strike to the first
    acknowledgement of a write, to an owner that the shard had then, that was begun after it.

    Left out are shards that nobody began to write to within `IDLE_S` of the strike: parts of a
    shard that was split may have few owners, and that these are idle is no outage.
    """
    written: dict[str, list[Op]] = {}
    for op in ops:
        if op.kind in WRITES:
            written.setdefault(op.owner, []).append(op)
    found = []
    for fault in struck:
        if fault.view is None:
            continue
        topology = Topology.read(fault.view)
        begun: dict[str, list[Op]] = {}
        for owner, writes in written.items():
            shard = topology.shard_of_owner(f"user:{owner}")
            if shard is not None and shard.id in fault.led:
                since = [op for op in writes if op.invoked_s >= fault.at_s]
                begun.setdefault(shard.id, []).extend(since)
        for writes in begun.values():
            acknowledged_s = [op.returned_s for op in writes if op.is_ok]
            is_busy = any(op.invoked_s < fault.at_s + IDLE_S for op in writes)
            if is_busy and acknowledged_s:
                found.append(min(acknowledged_s) - fault.at_s)
    return found


def silences_s(ops: Sequence[Op]) -> float:
    """The longest time between two acknowledged writes, of whatever client and shard."""
    times = sorted(op.returned_s for op in ops if op.is_ok and op.kind in WRITES)
    return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def figures(ops: Sequence[Op], struck: Sequence[Struck]) -> dict[str, Any]:
    outcomes = Counter(op.outcome for op in ops)
    of_one_leader = [fault for fault in struck if fault.nemesis in ("kill-leader", "pause-leader")]
    return {
        "operations": len(ops),
        "ok": outcomes[Outcome.OK],
        "failed": outcomes[Outcome.FAILED],
        "unknown": outcomes[Outcome.UNKNOWN],
        "by_kind": dict(Counter(op.kind for op in ops)),
        "error_codes": dict(Counter(op.code for op in ops if op.code)),
        "faults": len(struck),
        "latency_s": spread([op.returned_s - op.invoked_s for op in ops if op.is_ok]),
        "lost_leader_to_next_write_s": spread(next_writes_s(of_one_leader, ops)),
        "healed_to_ready_s": spread([f.ready_s for f in struck if f.ready_s is not None]),
        "longest_without_a_write_s": round(silences_s(ops), 3),
    }
