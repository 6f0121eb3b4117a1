"""The operators' half of NodeService, kept in a list: steps go on by one whenever anybody looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from agentmem_cluster.errors import Conflict
from agentmem_node.model import operations as ops
from agentmem_node.service.contract import Caller

NODES = ("n1", "n2", "n3", "n4")
STEP_BYTES = 3 << 20


def _four_shards() -> dict[str, list[str]]:
    return {f"s{i:02d}": ["n1", "n2", "n3"] for i in range(4)}


@dataclass
class OperationsInMemory:
    """`is_held`: nothing goes on. `failing`: shards whose step fails."""

    shards: dict[str, list[str]] = field(default_factory=_four_shards)
    stored: list[ops.Operation] = field(default_factory=list)
    begun: dict[bytes, ops.Operation] = field(default_factory=dict)
    findings: list[ops.Finding] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    is_held: bool = False
    callers: list[tuple[str, Caller]] = field(default_factory=list)

    async def plan(self, caller: Caller, wish: ops.OperationWish) -> ops.OperationPlan:
        self.callers.append(("plan", caller))
        return self._plan(wish)

    def _plan(self, wish: ops.OperationWish) -> ops.OperationPlan:
        for name in (wish.node, wish.away_from):
            if name is not None and name not in NODES:
                raise ops.unknown("node", name, NODES)
        if wish.shard is not None and wish.shard not in self.shards:
            raise ops.unknown("shard", wish.shard, self.shards)
        steps = [
            self._step(shard, members, wish)
            for shard, members in self.shards.items()
            if wish.shard in (None, shard) and wish.kind not in ("undrain", "rebalance")
        ]
        steps = [step for step in steps if step.from_members != step.to_members]
        return ops.OperationPlan(
            wish=wish,
            steps=steps,
            bytes=sum(step.bytes for step in steps),
            pause_ms_expected=300,
            warnings=["n4 is in the same zone as n1"] if steps else [],
        )

    @staticmethod
    def _step(shard: str, members: list[str], wish: ops.OperationWish) -> ops.PlannedStep:
        leaves = wish.away_from or (members[0] if wish.kind == "move" else wish.node)
        comes = wish.node if wish.kind == "move" else "n4"
        to = sorted({*(m for m in members if m != leaves), comes}) if leaves in members else members
        return ops.PlannedStep(
            shard=shard,
            from_members=members,
            to_members=[name for name in to if name is not None],
            preferred_leader=members[-1],
            reason=wish.kind,
            bytes=STEP_BYTES,
            copies=1,
        )

    async def begin_operation(self, caller: Caller, wish: ops.OperationWish) -> ops.Operation:
        self.callers.append(("begin", caller))
        if caller.request_id in self.begun:
            return self.begun[caller.request_id]
        steps = [
            ops.StepProgress(
                **msgspec.structs.asdict(step),
                state="pending",
                done_bytes=0,
                total_bytes=step.bytes,
                error="",
            )
            for step in self._plan(wish).steps
        ]
        operation = ops.Operation(
            id=f"op{len(self.stored) + 1}",
            wish=wish,
            state="running",
            created_at="2026-01-31T09:30:00.000Z",
            steps=steps,
            message="",
            by=caller.key_id or "anybody",
        )
        self.stored.insert(0, operation)
        if caller.request_id is not None:
            self.begun[caller.request_id] = operation
        return operation

    async def operations(self, caller: Caller) -> list[ops.Operation]:
        if not self.is_held:
            for operation in self.stored:
                self._go_on(operation)
        return self.stored

    def _go_on(self, operation: ops.Operation) -> None:
        if operation.state != "running":
            return
        step = next((s for s in operation.steps if s.state in ("pending", "copying")), None)
        if step is None:
            operation.state = "done"
        elif step.state == "pending":
            step.state, step.done_bytes = "copying", step.total_bytes // 2
        elif step.shard in self.failing:
            step.state, step.error = "failed", "the disk of n4 is full"
            operation.state = "failed"
        else:
            step.state, step.done_bytes = "done", step.total_bytes
            self.shards[step.shard] = step.to_members

    async def operation(self, caller: Caller, operation_id: str) -> ops.Operation:
        found = {operation.id: operation for operation in await self.operations(caller)}
        if operation_id not in found:
            raise ops.unknown("operation", operation_id, found)
        return found[operation_id]

    async def control_operation(
        self, caller: Caller, operation_id: str, action: ops.Action
    ) -> ops.Operation:
        self.callers.append((action, caller))
        known: dict[str, Any] = {operation.id: operation for operation in self.stored}
        if operation_id not in known:
            raise ops.unknown("operation", operation_id, known)
        operation: ops.Operation = known[operation_id]
        needed = ("running",) if action == "stop" else ("stopped", "failed")
        if operation.state not in needed:
            raise Conflict(f"The operation {operation_id} is {operation.state}.")
        operation.state = "stopped" if action == "stop" else "running"
        return operation

    async def check_cluster(self, caller: Caller) -> list[ops.Finding]:
        return self.findings
