"""The evidence of a run, and the form of a finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from agentmem_chaos.workloads.history import Op

DETAILS_MAX = 20


class Verdict(Enum):
    HOLDS = "holds"
    VIOLATED = "violated"
    UNKNOWN = "unknown"  # cut off, or the evidence could not be had: never counted as a pass
    NOTHING = "nothing to check"


@dataclass(frozen=True, slots=True)
class Finding:
    """`looked_at`: of how many things it was true. `details`: violations, at most some of them."""

    checker: str
    claim: str
    verdict: Verdict
    looked_at: int
    details: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "checker": self.checker,
            "claim": self.claim,
            "verdict": self.verdict.value,
            "looked_at": self.looked_at,
            "details": list(self.details),
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """A memory as a list of its owner's memories shows it."""

    memory_id: str
    content: str
    version: int = 1


Inventory = Mapping[str, Sequence[Stored]]  # owner to memories


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a node without a majority answered. `status` 0: nothing within the time."""

    node: str
    shard: str
    asked: str
    at_s: float
    took_s: float
    status: int
    code: str


@dataclass(frozen=True, slots=True)
class Crash:
    """A node that ended although nobody told it to and no disk failed."""

    node: str
    at_s: float
    log_tail: str


@dataclass(frozen=True, slots=True)
class Damage:
    """What became of a damaged node. `outcome`: "recovered", "refused" or "hung"."""

    node: str
    file: str  # relative to the data directory
    how: str
    outcome: str
    exit_code: int | None
    said: str


@dataclass(slots=True)
class Evidence:
    """`views`: each node's `GET /cluster`, once writes had stopped. None: could not be had.

    `patience_s`: client to the deadline of its calls, where that is not `call_s_max`.
    `replicas`: the inventory as each node's own replica shows it, or how the node refused.
    `searched`: word to whether a search at the end found its memory.
    """

    ops: Sequence[Op]
    call_s_max: float
    patience_s: Mapping[int, float] = field(default_factory=dict)
    inventory: Inventory | None = None
    replicas: Mapping[str, Inventory | str] | None = None
    searched: Mapping[str, bool] | None = None
    views: Mapping[str, Mapping[str, Any]] | None = None
    refusals: Sequence[Refusal] = ()
    crashes: Sequence[Crash] = ()
    damages: Sequence[Damage] = ()
    converged_s: float | None = None
    converge_s_max: float = 0.0
    trouble: Sequence[str] = field(default_factory=tuple)


Checker = Callable[[Evidence], Finding]


def finding(
    checker: str, claim: str, looked_at: int, violations: Sequence[str], *, unknown: str = ""
) -> Finding:
    """Violations beat `unknown`, which beats nothing."""
    if violations:
        shown = list(violations[:DETAILS_MAX])
        if len(violations) > DETAILS_MAX:
            shown.append(f"... and {len(violations) - DETAILS_MAX} more")
        return Finding(checker, claim, Verdict.VIOLATED, looked_at, tuple(shown))
    if unknown:
        return Finding(checker, claim, Verdict.UNKNOWN, looked_at, (unknown,))
    verdict = Verdict.HOLDS if looked_at else Verdict.NOTHING
    return Finding(checker, claim, verdict, looked_at)
