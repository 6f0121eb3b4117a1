"""The state of a cluster as a table: each node's own answer, joined into one row a shard.

Shared by `agentmem cluster status` and the demo. Every node is asked for itself: one that is
down is shown as down, and lag is what the replicas themselves say, not what a leader believes.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

import agentmem_client as client
from agentmem_node.cli.output import table

_ASK_S = 2.0
_REASON_ITEMS_SHOWN = 4


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node: what it says of itself, or why it cannot be asked."""

    id: str
    url: str
    is_up: bool
    is_ready: bool
    trouble: str = ""
    view: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardState:
    """One shard, as its replicas say. `applied`: node id to entry."""

    id: str
    epoch: int
    leader: str | None
    members: tuple[str, ...]
    applied: Mapping[str, int]
    memories: int | None

    @property
    def lag(self) -> int | None:
        """Entries that the slowest replica which answered is behind the furthest."""
        known = self.applied.values()
        return max(known) - min(known) if known else None


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Everything `cluster status` shows."""

    version: int
    nodes: tuple[NodeState, ...]
    shards: tuple[ShardState, ...]

    @property
    def leaderless(self) -> tuple[str, ...]:
        return tuple(shard.id for shard in self.shards if shard.leader is None)

    @property
    def is_healthy(self) -> bool:
        return not self.leaderless and all(node.is_ready for node in self.nodes)

    def to_plain(self) -> dict[str, Any]:
        return {
            "healthy": self.is_healthy,
            "version": self.version,
            "nodes": [
                {"id": n.id, "url": n.url, "up": n.is_up, "ready": n.is_ready, "why": n.trouble}
                for n in self.nodes
            ],
            "shards": [
                {
                    "id": s.id,
                    "epoch": s.epoch,
                    "leader": s.leader,
                    "members": s.members,
                    "applied": s.applied,
                    "lag": s.lag,
                    "memories": s.memories,
                }
                for s in self.shards
            ],
        }


def ask(urls: list[str], api_key: str | None = None, timeout_s: float = _ASK_S) -> ClusterState:
    """Ask every node that any of `urls` knows of. Raises the client's errors when none answers."""
    policy = client.Policy(deadline_s=timeout_s, unreachable_s_max=timeout_s / 2)
    with client.Client(urls, api_key=api_key, policy=policy) as first:
        topology = first.cluster()
    # A node alone may not know by which address the world reaches it: the one that answered.
    addresses = topology.urls or {str(topology.raw.get("node", "?")): urls[0]}

    def ask_one(named: tuple[str, str]) -> NodeState:
        name, url = named
        with client.Client(url, api_key=api_key, policy=policy) as one:
            try:
                health = one.health(deadline_s=timeout_s)
                view = one.cluster(deadline_s=timeout_s).raw
            except client.AgentMemError as error:
                return NodeState(name, url, False, False, _short(error))
        why = "" if health.is_ready else _reasons(health.details)
        return NodeState(name, url, True, health.is_ready, why, view)

    with ThreadPoolExecutor(max_workers=min(16, len(addresses))) as pool:
        nodes = tuple(pool.map(ask_one, sorted(addresses.items())))
    newest = max(
        (node.view for node in nodes if node.view),
        key=lambda view: int(view.get("version", 0)),
        default=topology.raw,
    )
    return ClusterState(int(newest.get("version", 0)), nodes, tuple(join(newest, nodes)))


def _short(error: client.AgentMemError) -> str:
    if isinstance(error, client.ConnectionFailed | client.DeadlineExceeded):
        return "does not answer"
    return error.message


def _reasons(details: Mapping[str, Any]) -> str:
    reasons = details.get("reasons", details)
    if isinstance(reasons, Mapping):
        shown = [f"{name}: {_listed(value)}" for name, value in reasons.items() if name != "ready"]
        return "; ".join(shown)[:200]
    return str(reasons)[:200]


def _listed(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    few, more = value[:_REASON_ITEMS_SHOWN], len(value) - _REASON_ITEMS_SHOWN
    return ", ".join(map(str, few)) + (f" and {more} more" if more > 0 else "")


def join(view: Mapping[str, Any], nodes: tuple[NodeState, ...]) -> list[ShardState]:
    """One state a shard of `view` (the newest map), from what each node says of its replica."""
    states = []
    for name, shard in sorted(view["shards"].items()):
        epoch, members = int(shard["epoch"]), tuple(shard["members"])
        applied: dict[str, int] = {}
        memories: dict[str, int] = {}
        leaders: dict[str, int] = {}  # leader -> term in which it is believed to lead
        for node in nodes:
            told = node.view.get("shards", {}).get(name) if node.view else None
            if told is None or int(told["epoch"]) != epoch:
                continue
            if told.get("leader") is not None:
                leaders[told["leader"]] = int(told.get("term") or 0)
            if node.id not in members:
                continue
            index = _own(told.get("applied_index", told.get("applied")), node.id)
            if index is not None:
                applied[node.id] = index
            count = _own(told.get("memories"), node.id)
            if count is not None:
                memories[node.id] = count
        up = {node.id for node in nodes if node.is_up}
        # A node that is down cannot lead, whatever the others still believe.
        alive = {leader: term for leader, term in leaders.items() if leader in up}
        leader = max(alive, key=lambda one: (alive[one], one)) if alive else None
        count = memories.get(leader) if leader in memories else max(memories.values(), default=None)
        states.append(ShardState(name, epoch, leader, members, applied, count))
    return states


def _own(value: Any, node: str) -> int | None:
    """A figure that is either the answering node's, or a table by node."""
    if isinstance(value, Mapping):
        value = value.get(node)
    return value if isinstance(value, int) else None


def render(state: ClusterState) -> Group:
    """The tables for a terminal."""
    led: dict[str, int] = {}
    for shard in state.shards:
        if shard.leader is not None:
            led[shard.leader] = led.get(shard.leader, 0) + 1
    nodes = table(
        ("*node", "*state", ">*leads", "*url", "why"),
        (
            (node.id, _node_text(node), str(led.get(node.id, 0)), node.url, node.trouble)
            for node in state.nodes
        ),
    )
    up = {node.id for node in state.nodes if node.is_up}
    shards = table(
        ("*shard", ">*epoch", "*leader", "*members", ">*applied", ">*lag", ">*memories"),
        (_shard_row(shard, up) for shard in state.shards),
    )
    return Group(nodes, Text(), shards)


def _node_text(node: NodeState) -> Text:
    if node.is_ready:
        return Text("ready", style="green")
    return Text("not ready", style="yellow") if node.is_up else Text("down", style="red bold")


def _shard_row(shard: ShardState, up: set[str]) -> tuple[str | Text, ...]:
    members = Text(" ").join(
        Text(name, style="" if name in up else "red strike") for name in shard.members
    )
    leader = Text(shard.leader) if shard.leader else Text("none", style="red bold")
    applied = max(shard.applied.values(), default=None)
    lag = shard.lag
    return (
        shard.id,
        str(shard.epoch),
        leader,
        members,
        "-" if applied is None else f"{applied:,}",
        "-" if lag is None else Text(str(lag), style="yellow" if lag > 100 else ""),
        "-" if shard.memories is None else f"{shard.memories:,}",
    )


def render_plain(state: ClusterState) -> Table:
    """One line a node, for where the whole table would be too long."""
    return table(
        ("*node", "*state", ">*leads"),
        (
            (node.id, _node_text(node), str(sum(s.leader == node.id for s in state.shards)))
            for node in state.nodes
        ),
    )
