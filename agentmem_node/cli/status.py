"""The state of a cluster as a table: each node's own answer, joined into one row a shard.

Shared by `agentmem cluster status` and the demo. Every node is asked for itself: one that is
down is shown as down, and lag is what the replicas themselves say, not what a leader believes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

import agentmem_client as client
from agentmem_node.cli.admin import Admin
from agentmem_node.cli.output import table
from agentmem_node.cli.plan_view import operation_view
from agentmem_node.model import operations as ops

_ASK_S = 2.0
_REASON_ITEMS_SHOWN = 4


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node: what it says of itself, or why it cannot be asked.

    `membership` is what the cluster says of it: `active` or `draining`.
    """

    id: str
    url: str
    is_up: bool
    is_ready: bool
    trouble: str = ""
    view: Mapping[str, Any] = field(default_factory=dict)
    zone: str = ""
    membership: str = "active"


@dataclass(frozen=True, slots=True)
class ShardState:
    """One shard, as its replicas say. `applied`: node id to entry.

    `digests`: node id to an entry and the digest of the replica's state after it.
    """

    id: str
    epoch: int
    leader: str | None
    members: tuple[str, ...]
    applied: Mapping[str, int]
    memories: int | None
    digests: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def digests_agree(self) -> bool | None:
        """Whether replicas at the same entry have the same state; None when no two are at one."""
        by_index: dict[int, list[str]] = {}
        for index, digest in self.digests.values():
            by_index.setdefault(index, []).append(digest)
        comparable = [found for found in by_index.values() if len(found) > 1]
        if not comparable:
            return None
        return all(len(set(found)) == 1 for found in comparable)

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
    operations: tuple[ops.Operation, ...] = ()  # that are running, as far as one may know

    @property
    def diverged(self) -> tuple[str, ...]:
        return tuple(shard.id for shard in self.shards if shard.digests_agree is False)

    @property
    def leaderless(self) -> tuple[str, ...]:
        return tuple(shard.id for shard in self.shards if shard.leader is None)

    @property
    def is_healthy(self) -> bool:
        all_ready = all(node.is_ready for node in self.nodes)
        return all_ready and not self.leaderless and not self.diverged

    def to_plain(self) -> dict[str, Any]:
        return {
            "healthy": self.is_healthy,
            "version": self.version,
            "nodes": [
                {
                    "id": n.id,
                    "url": n.url,
                    "up": n.is_up,
                    "ready": n.is_ready,
                    "why": n.trouble,
                    "zone": n.zone,
                    "state": n.membership,
                }
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
                    "digests_agree": s.digests_agree,
                }
                for s in self.shards
            ],
            "operations": msgspec.to_builtins(self.operations),
        }


def ask(urls: list[str], api_key: str | None = None, timeout_s: float = _ASK_S) -> ClusterState:
    """Ask every node that any of `urls` knows of. Raises the client's errors when none answers."""
    policy = client.Policy(deadline_s=timeout_s, unreachable_s_max=timeout_s / 2)
    with client.Client(urls, api_key=api_key, policy=policy) as first:
        topology = first.cluster()
        running = _running(first)
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
        details = health.details
        if health.is_ready:  # all the same it may be without a replica that others answer for
            details = {"reasons": details.get("reasons", {})}
        return NodeState(name, url, True, health.is_ready, _reasons(details), view)

    with ThreadPoolExecutor(max_workers=min(16, len(addresses))) as pool:
        nodes = tuple(pool.map(ask_one, sorted(addresses.items())))
    newest = max(
        (node.view for node in nodes if node.view),
        key=lambda view: int(view.get("version", 0)),
        default=topology.raw,
    )
    nodes = tuple(_placed(node, newest) for node in nodes)
    return ClusterState(int(newest.get("version", 0)), nodes, tuple(join(newest, nodes)), running)


def _running(memory: client.Client) -> tuple[ops.Operation, ...]:
    """Nothing for whom may not see them, or when the cluster cannot say: the rest is still true."""
    try:
        found = Admin(memory).operations()
    except client.AgentMemError:
        return ()
    return tuple(operation for operation in found if operation.state == "running")


def _placed(node: NodeState, view: Mapping[str, Any]) -> NodeState:
    told = view.get("nodes", {}).get(node.id, {})
    return replace(
        node,
        zone=str(told.get("zone") or ""),
        membership=str(told.get("state") or "active"),
    )


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
        digests: dict[str, tuple[int, str]] = {}
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
                at = told.get("digest_index", index)
                if isinstance(told.get("digest"), str) and isinstance(at, int):
                    digests[node.id] = (at, told["digest"])
            count = _own(told.get("memories"), node.id)
            if count is not None:
                memories[node.id] = count
        up = {node.id for node in nodes if node.is_up}
        # A node that is down cannot lead, whatever the others still believe.
        alive = {leader: term for leader, term in leaders.items() if leader in up}
        leader = max(alive, key=lambda one: (alive[one], one)) if alive else None
        count = memories.get(leader) if leader in memories else max(memories.values(), default=None)
        states.append(ShardState(name, epoch, leader, members, applied, count, digests))
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
    held: dict[str, int] = {}
    for shard in state.shards:
        for member in shard.members:
            held[member] = held.get(member, 0) + 1
    nodes = table(
        ("*node", "*state", ">*leads", ">*replicas", "*zone", "*url", "why"),
        (
            (
                node.id,
                _node_text(node),
                str(led.get(node.id, 0)),
                str(held.get(node.id, 0)),
                node.zone or "-",
                node.url,
                node.trouble,
            )
            for node in state.nodes
        ),
    )
    up = {node.id for node in state.nodes if node.is_up}
    shards = table(
        (
            "*shard",
            ">*epoch",
            "*leader",
            "*members",
            ">*applied",
            ">*lag",
            "*digests",
            ">*memories",
        ),
        (_shard_row(shard, up) for shard in state.shards),
    )
    return Group(nodes, Text(), shards, *_under_way(state.operations))


def _under_way(operations: Iterable[ops.Operation]) -> list[Text | Group]:
    return [part for one in operations for part in (Text(), operation_view(one))]


def _node_text(node: NodeState) -> Text:
    if node.is_ready:
        text = Text("ready", style="yellow" if node.trouble else "green")
    elif node.is_up:
        text = Text("not ready", style="yellow")
    else:
        text = Text("down", style="red bold")
    if node.membership != "active":
        text.append(f", {node.membership}", style="yellow")
    return text


def _digests_text(shard: ShardState) -> Text:
    match shard.digests_agree:
        case None:
            return Text("-")
        case True:
            return Text("equal", style="green")
        case False:
            return Text("DIFFER", style="red bold")


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
        _digests_text(shard),
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
