"""What every node says of its replicas: for checks, plans and healing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.invariants import ReplicaReport
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import Role
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.routing import Routing
from agentmem_node.service.view import UNREADABLE, View

_CALL_S = 1.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """`copying`: shards of which this node makes a copy now. `bytes`: of each shard's file."""

    replicas: tuple[ReplicaReport, ...]
    bytes: dict[str, int]
    copying: frozenset[str]


class Survey:
    def __init__(
        self, node_id: str, link: Link | None, routing: Routing, replicas: Replicas
    ) -> None:
        self._node_id = node_id
        self._link = link
        self._routing = routing
        self._replicas = replicas
        if link is not None:
            link.register("node.replicas", self._on_asked)

    async def take(self, view: View) -> dict[str, NodeReport]:
        """By node; one that did not answer is not in it."""
        names = sorted({*view.nodes, *view.map.nodes(), self._node_id})
        found = await asyncio.gather(*(self._ask(name) for name in names))
        return {name: one for name, one in zip(names, found, strict=True) if one is not None}

    async def _ask(self, node: str) -> NodeReport | None:
        if node == self._node_id:
            return _read(self._here())
        if self._link is None or not self._routing.is_connected(node):
            return None
        try:
            return _read(await self._link.call(node, "node.replicas", {}, timeout=_CALL_S))
        except UNREADABLE:
            return None

    async def _on_asked(self, _peer: str, _body: dict[str, Any]) -> dict[str, Any]:
        return self._here()

    def _here(self) -> dict[str, Any]:
        rows, sizes = [], {}
        for shard, local in self._routing.local.items():
            try:
                status = local.group.status()
            except (AgentMemError, KeyError):
                continue  # it is changing hands at this moment
            rows.append(
                [
                    shard,
                    local.info.epoch,
                    local.shard.applied_index,
                    local.shard.digest(),
                    status.role is Role.LEADER,
                    status.term,
                    max(0, status.commit_index - status.applied_index),
                    status.needs_reseed,
                    local.machine.is_sealed,
                    shard in self._replicas.damaged,
                ]
            )
            sizes[shard] = local.shard.stats()["bytes"]
        return {"replicas": rows, "bytes": sizes, "copying": sorted(self._replicas.set.staged)}


def _read(wire: Any) -> NodeReport:
    return NodeReport(
        tuple(ReplicaReport(*row) for row in wire["replicas"]),
        {str(shard): int(size) for shard, size in wire["bytes"].items()},
        frozenset(wire["copying"]),
    )
