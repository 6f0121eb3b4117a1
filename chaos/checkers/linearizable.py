"""Registers: every operation took effect at one moment between its call and its answer."""

from __future__ import annotations

import math

from agentmem_chaos.checker import Kind, Operation, Verdict, check
from agentmem_chaos.checkers.base import Evidence, Finding, finding
from agentmem_chaos.workloads.history import Op, Outcome
from agentmem_chaos.workloads.registers import INITIAL

NAME = "linearizable"
CLAIM = "registers are linearizable, refused operations included: they took no effect"
_KINDS = {"read": Kind.READ, "write": Kind.WRITE, "cas": Kind.CAS}
STEPS_MAX_PER_KEY = 1_000_000


def operations(ops: list[Op]) -> list[Operation]:
    """What the search is told: a refused operation claims to have had no effect, so it is left
    out, and a value of it that somebody reads has no explanation."""
    made = []
    for op in ops:
        kind = _KINDS.get(op.kind)
        if kind is None or op.outcome is Outcome.FAILED:
            continue
        made.append(
            Operation(
                client=op.client,
                key=op.key,
                invoked_s=op.invoked_s,
                returned_s=op.returned_s if op.is_ok else math.inf,
                kind=kind,
                value=op.value,
                expected=op.expected,
                result=op.result if op.is_ok else None,
                order=op.order if op.is_ok else None,
            )
        )
    return made


def linearizable(evidence: Evidence) -> Finding:
    told = operations(list(evidence.ops))
    if not told:
        return finding(NAME, CLAIM, 0, [])
    report = check(told, initial=INITIAL, steps_max_per_key=STEPS_MAX_PER_KEY)
    violations = []
    for key in report.violations:
        blocked = key.blocked
        where = "" if blocked is None else f"; no explanation for {_told(blocked)}"
        violations.append(f"register {key.key} ({key.operations} operations){where}")
    cut = [key.key for key in report.keys if key.verdict is Verdict.UNKNOWN]
    unknown = f"the search was cut off for {len(cut)} registers: {cut[:5]}" if cut else ""
    return finding(NAME, CLAIM, len(told), violations, unknown=unknown)


def _told(op: Operation) -> str:
    times = f"{op.invoked_s:.3f} to {op.returned_s:.3f} s"
    if op.kind is Kind.READ:
        return f"a read of {op.result!r} by client {op.client}, {times}"
    if op.kind is Kind.CAS:
        return f"cas({op.expected!r}, {op.value!r}) = {op.result} by client {op.client}, {times}"
    return f"a write of {op.value!r} by client {op.client}, {times}"
