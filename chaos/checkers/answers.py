"""What clients were answered: in time, with errors that mean something; how minorities refused."""

from __future__ import annotations

import math

from agentmem_chaos.checkers.base import Evidence, Finding, finding
from agentmem_chaos.workloads.history import Op

IN_TIME = "in-time"
# Beyond its deadline: the answer's way back on a machine whose cores run everything.
GRACE_S = 2.0
ERRORS = "errors"
ERRORS_CLAIM = "no answer is an internal error or not of the API"
MINORITY = "minority"
REFUSAL_S_MAX = 2.0
MINORITY_CLAIM = f"a node without a majority refuses within {REFUSAL_S_MAX:g} s"
_BUGS = ("internal", "protocol")
_REFUSALS = (503, 504)


def in_time(evidence: Evidence) -> Finding:
    claim = f"every call ends by its deadline (and {GRACE_S:g} s of grace)"
    answered = [op for op in evidence.ops if not math.isinf(op.returned_s)]
    violations = [
        f"{op.kind} {op.key} took {op.returned_s - op.invoked_s:.2f} s (at {op.invoked_s:.1f} s)"
        for op in answered
        if op.returned_s - op.invoked_s > _deadline_s(op, evidence) + GRACE_S
    ]
    return finding(IN_TIME, claim, len(answered), violations)


def _deadline_s(op: Op, evidence: Evidence) -> float:
    if op.kind in ("tick", "again"):
        return evidence.call_s_max  # sent by several clients, and ended by the most patient
    return evidence.patience_s.get(op.client, evidence.call_s_max)


def errors(evidence: Evidence) -> Finding:
    violations = [
        f"{op.kind} {op.key} at {op.invoked_s:.3f} s: {op.code}: {op.message}"
        for op in evidence.ops
        if op.code in _BUGS
    ]
    return finding(ERRORS, ERRORS_CLAIM, len(evidence.ops), violations)


def minority(evidence: Evidence) -> Finding:
    violations = []
    for refusal in evidence.refusals:
        asked = f"{refusal.node}, {refusal.shard}, {refusal.asked} at {refusal.at_s:.1f} s"
        if refusal.status not in _REFUSALS:
            violations.append(f"{asked}: answered {refusal.status} {refusal.code}".rstrip())
        elif refusal.took_s > REFUSAL_S_MAX:
            violations.append(f"{asked}: refused ({refusal.code}) after {refusal.took_s:.2f} s")
    return finding(MINORITY, MINORITY_CLAIM, len(evidence.refusals), violations)
