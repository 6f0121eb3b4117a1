"""Every operation of a run, recorded when it is invoked: one that never returns is in it too."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from agentmem_client import AgentMemError, ClientClosed

T = TypeVar("T")


class Outcome(Enum):
    OK = "ok"
    FAILED = "failed"  # certainly without effect
    UNKNOWN = "unknown"  # no answer, or one that leaves it open


@dataclass(slots=True)
class Op:
    """One operation. Times are seconds since the run began; `returned_s` is inf without an answer.

    `key`: what it acts on (a register, a memory's word, a tick). `order`: where the cluster says
    that it took effect, among the operations on the same key.
    """

    number: int
    client: int
    kind: str
    key: str
    owner: str
    invoked_s: float
    value: str | None = None
    expected: str | None = None
    returned_s: float = math.inf
    outcome: Outcome = Outcome.UNKNOWN
    result: Any = None
    code: str = ""
    message: str = ""
    order: float | None = None

    @property
    def is_ok(self) -> bool:
        return self.outcome is Outcome.OK

    def as_json(self) -> list[Any]:
        """Compact: the report embeds thousands of these."""
        returned = None if math.isinf(self.returned_s) else round(self.returned_s, 4)
        return [
            self.number,
            self.client,
            self.kind,
            self.key,
            self.owner,
            round(self.invoked_s, 4),
            returned,
            self.outcome.value,
            self.value,
            self.expected,
            self.result,
            self.code,
        ]


@dataclass(slots=True)
class History:
    """`now_s`: seconds since the run began, on a clock that never goes back."""

    now_s: Callable[[], float]
    ops: list[Op] = field(default_factory=list)

    @classmethod
    def starting_now(cls) -> History:
        began = time.monotonic()
        return cls(lambda: time.monotonic() - began)

    def begin(
        self,
        client: int,
        kind: str,
        key: str,
        owner: str,
        *,
        value: str | None = None,
        expected: str | None = None,
    ) -> Op:
        op = Op(len(self.ops), client, kind, key, owner, self.now_s(), value, expected)
        self.ops.append(op)
        return op

    def returned(
        self, op: Op, outcome: Outcome, result: Any = None, order: float | None = None
    ) -> None:
        op.outcome = outcome
        op.result = result
        op.order = order
        if outcome is not Outcome.UNKNOWN:
            op.returned_s = self.now_s()

    def refused(self, op: Op, error: AgentMemError, *, is_read: bool = False) -> None:
        """What the client says of the outcome is taken at its word, and thereby tested."""
        op.code = error.code
        op.message = error.message[:300]
        unknown = error.outcome_unknown and not is_read
        self.returned(op, Outcome.UNKNOWN if unknown else Outcome.FAILED)

    async def attempt(
        self, op: Op, call: Awaitable[T], *, is_read: bool = False
    ) -> tuple[T | None, AgentMemError | None]:
        """(answer, None) or (None, error); of an error, the operation is recorded already."""
        try:
            return await call, None
        except ClientClosed:
            raise
        except AgentMemError as error:
            self.refused(op, error, is_read=is_read)
            return None, error
