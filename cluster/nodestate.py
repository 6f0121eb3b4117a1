"""What the planner and the checks know of a node, and which of its replicas count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentmem_cluster.errors import InvalidField
from agentmem_cluster.shardmap import ShardMap


@dataclass(frozen=True, slots=True)
class NodeState:
    id: str
    zone: str = ""  # "" = no label
    is_draining: bool = False  # gets no replica, loses those it has
    is_lost: bool = False  # unreachable for longer than the set time: re-found its replicas
    is_up: bool = True

    @property
    def is_active(self) -> bool:
        """Whether it is one of those over which replicas are spread."""
        return not self.is_draining and not self.is_lost

    @property
    def is_live(self) -> bool:
        """Whether it votes now."""
        return self.is_up and not self.is_lost

    @property
    def takes_replicas(self) -> bool:
        """Whether it can be given a replica now: a node that is down cannot copy one."""
        return self.is_active and self.is_up


Nodes = Mapping[str, NodeState] | Sequence[NodeState]


def states_of(nodes: Nodes, shard_map: ShardMap | None = None) -> dict[str, NodeState]:
    """By id, in the order of ids. A member of the map that nobody knows any more is lost.

    Raises InvalidField when a node is named twice, or stands under another's id.
    """
    if isinstance(nodes, Mapping):
        states = dict(nodes)
        wrong = [key for key, state in states.items() if key != state.id]
    else:
        states = {state.id: state for state in nodes}
        wrong = [] if len(states) == len(nodes) else sorted(state.id for state in nodes)
    if wrong:
        raise InvalidField(
            f"`nodes` names a node twice, or under another's id: {', '.join(wrong)}.",
            hint="Name each node once.",
            field="nodes",
        )
    for member in () if shard_map is None else shard_map.nodes():
        states.setdefault(member, NodeState(member, is_lost=True, is_up=False))
    return dict(sorted(states.items()))


def majority(voters: Collection[str]) -> int:
    return len(voters) // 2 + 1


def live(members: Iterable[str], states: Mapping[str, NodeState]) -> list[str]:
    return [member for member in members if states[member].is_live]


def has_quorum(members: Collection[str], states: Mapping[str, NodeState]) -> bool:
    return len(live(members, states)) >= majority(members)
