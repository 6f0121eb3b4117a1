"""The demo's cluster changes its nodes: one joins with a token, shards move, it is drained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agentmem_client import TemporarilyUnavailable
from agentmem_node.cli.admin import Admin
from agentmem_node.cli.devlayout import DevClusterError
from agentmem_node.console.story import Demo
from agentmem_node.model import operations as ops

# With more, `n10` would sort before `n2`, dial it, and go round the relays.
NODES_MAX = 9
_POLL_S = 0.05
_OPERATION_S_MAX = 120.0

Told = Callable[[ops.StepProgress, float], None]
"""Called with each shard that moved and the seconds that it took."""


@dataclass(slots=True)
class Change:
    """An operation that ended, and what writes noticed of it."""

    operation: ops.Operation | None  # None: nothing had to move
    took_s: float = 0.0
    longest_write_s: float = 0.0
    acknowledged: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.operation is None or self.operation.state == "done"

    @property
    def moved(self) -> int:
        steps = [] if self.operation is None else self.operation.steps
        return sum(step.state == "done" for step in steps)

    @property
    def why(self) -> str:
        """Why it is not done."""
        if self.operation is None:
            return ""
        errors = [f"{step.shard}: {step.error}" for step in self.operation.steps if step.error]
        return self.operation.message or "; ".join(errors) or self.operation.state


def join(demo: Demo) -> tuple[str, float]:
    """A new node, let in with a token: (its id, seconds until it was ready). It has no shard yet.

    Raises DevClusterError and the client's errors.
    """
    if len(demo.cluster.nodes) >= NODES_MAX:
        raise DevClusterError(f"{NODES_MAX} nodes are enough for one machine: `drain` one.")
    begun = time.monotonic()
    node = demo.cluster.place_newcomer()
    token = Admin(demo.client).join_token(node=node.id).token
    demo.cluster.join(node, token, peer=demo.wires.address(None, node.id, node.peer))
    return node.id, time.monotonic() - begun


def change(demo: Demo, wish: ops.OperationWish, told: Told) -> Change:
    """Begin what is wished and wait for its end, while memories are written.

    Raises the client's errors, and DevClusterError when it has no end in time: it then goes on.
    """
    admin = Admin(demo.client)
    plan = admin.plan(wish)
    if not plan.steps and wish.kind not in ("drain", "undrain", "remove"):
        return Change(None)
    with demo.writing() as writer:
        begun = time.monotonic()
        operation = _until_it_ends(admin, admin.begin(wish), told)
        took_s = time.monotonic() - begun
    return Change(operation, took_s, writer.longest_s, writer.acknowledged, writer.refused)


def _until_it_ends(admin: Admin, operation: ops.Operation, told: Told) -> ops.Operation:
    deadline = time.monotonic() + _OPERATION_S_MAX
    begun: dict[str, float] = {}
    ended: set[str] = set()
    while True:
        now = time.monotonic()
        for step in operation.steps:
            if step.state != "pending":
                begun.setdefault(step.shard, now)
            if step.state in ("done", "failed") and step.shard not in ended:
                ended.add(step.shard)
                told(step, now - begun[step.shard])
        if operation.state != "running":
            return operation
        if now >= deadline:
            raise DevClusterError(
                f"The operation {operation.id} has not ended within {_OPERATION_S_MAX:g} s. It "
                "goes on; `status` shows it."
            )
        time.sleep(_POLL_S)
        try:
            operation = admin.operation(operation.id)
        except TemporarilyUnavailable:
            continue  # the cluster carries on with it, whether or not it answers just now
