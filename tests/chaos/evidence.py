"""Histories written by hand, for checkers to be tested with."""

from __future__ import annotations

import math
from typing import Any

from agentmem_chaos.checkers.base import Evidence, Stored
from agentmem_chaos.workloads.history import Op, Outcome

OK, FAILED, UNKNOWN = Outcome.OK, Outcome.FAILED, Outcome.UNKNOWN


class Story:
    """Operations one after the other, a second apart, unless times are given."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def op(
        self,
        kind: str,
        key: str,
        outcome: Outcome = OK,
        result: Any = None,
        *,
        value: str | None = None,
        expected: str | None = None,
        owner: str = "ana",
        client: int = 0,
        at: tuple[float, float] | None = None,
        code: str = "",
        order: float | None = None,
    ) -> Op:
        begun = float(len(self.ops))
        invoked_s, returned_s = at or (begun, begun + 0.5)
        made = Op(
            number=len(self.ops),
            client=client,
            kind=kind,
            key=key,
            owner=owner,
            invoked_s=invoked_s,
            value=value,
            expected=expected,
            returned_s=math.inf if outcome is UNKNOWN else returned_s,
            outcome=outcome,
            result=result,
            code=code,
            order=order,
        )
        self.ops.append(made)
        return made

    def add(self, word: str, outcome: Outcome = OK, memory_id: str | None = None) -> Op:
        result = (memory_id or f"id-{word}") if outcome is OK else None
        return self.op("add", word, outcome, result, value=f"{word} text")

    def evidence(self, *stored: Stored, **more: Any) -> Evidence:
        return Evidence(self.ops, 5.0, inventory={"ana": list(stored)}, **more)


def stored(word: str, memory_id: str | None = None) -> Stored:
    return Stored(memory_id or f"id-{word}", f"{word} text")
