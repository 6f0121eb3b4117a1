"""Plans: which shards change their members, and to whom, so that a wish about nodes comes true.

Pure: a shard map and the states of the nodes give steps. Each step is one epoch change of one
shard, independent of the others: the old group seals while its majority is alive, and the new
one serves as a majority of it is. Steps may be carried out one at a time, in the order given,
and a plan may be given up after any of them.

A change of the preferred leader alone is no epoch change: `preferred_changes` says which are due.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from agentmem_cluster.balance import Placement, Ring
from agentmem_cluster.errors import BadRequest, InvalidField
from agentmem_cluster.nodestate import Nodes, NodeState, has_quorum, live, majority, states_of
from agentmem_cluster.preferred import even_leaders
from agentmem_cluster.ring import assign
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_cluster.splitting import Split, split_ranges
from agentmem_cluster.voters import meta_voters

__all__ = [
    "NodeState",
    "Split",
    "Step",
    "meta_voters",
    "plan_drain",
    "plan_lost",
    "plan_move",
    "plan_rebalance",
    "plan_remove",
    "preferred_changes",
    "shards_without_quorum",
    "split_ranges",
]

States = Mapping[str, NodeState]


@dataclass(frozen=True, slots=True)
class Step:
    """The target of one epoch change of one shard."""

    shard: str
    members: tuple[str, ...]  # sorted
    preferred_leader: str
    reason: str  # for a person: "n4 takes over from n2"


def plan_move(
    map: ShardMap, nodes: Nodes, shard: str, to: str, *, away_from: str | None = None
) -> list[Step]:
    """Give `to` a replica of `shard` in place of one: that of `away_from`, or the one least missed.

    Raises InvalidField for a shard or node that is not known, BadRequest when it cannot be done.
    """
    states = states_of(nodes, map)
    old = _shard(map, shard)
    target = _node(states, to, "to")
    if away_from is not None and away_from not in old.members:
        raise InvalidField(
            f"Node {away_from!r} has no replica of shard {shard}.",
            hint=f"Its replicas are on {', '.join(old.members)}.",
            field="away_from",
        )
    if to in old.members:
        raise BadRequest(
            f"Shard {shard} is on node {to} already.",
            hint=f"Choose a node that is none of {', '.join(old.members)}.",
            shard=shard,
            node=to,
        )
    if not target.takes_replicas:
        fault = "is draining" if target.is_draining else "is lost" if target.is_lost else "is down"
        raise BadRequest(
            f"Shard {shard} cannot move to node {to}: it {fault}.",
            hint="Choose a node that is up and not draining.",
            shard=shard,
            node=to,
        )
    gone = away_from or min(old.members, key=lambda n: _missed(map, states, old, to, n))
    new = {*old.members} - {gone} | {to}
    _must_have_quorums(states, old, new)
    return _steps(map, states, {shard: new})


def plan_drain(
    map: ShardMap, nodes: Nodes, node: str, replication: int, *, fewer_replicas: bool = False
) -> list[Step]:
    """Move every replica off `node`, and nothing else.

    A shard keeps as many replicas as it has, or `replication` when that is fewer. Where too few
    nodes are left for that, BadRequest says how many are needed; with `fewer_replicas` shards
    shrink to the nodes there are. Raises BadRequest too when a shard's old or new members lack
    a live majority, or nobody is left to take replicas.
    """
    return _plan_without(map, nodes, node, replication, "Draining", fewer_replicas)


def plan_remove(
    map: ShardMap, nodes: Nodes, node: str, replication: int, *, fewer_replicas: bool = False
) -> list[Step]:
    """What must move before `node`, up or not, can leave the cluster. Else as `plan_drain`."""
    return _plan_without(map, nodes, node, replication, "Removing", fewer_replicas)


def plan_rebalance(map: ShardMap, nodes: Nodes, replication: int) -> list[Step]:
    """The few moves after which replicas are well spread and loads within bounds.

    New nodes take their part, draining and lost nodes are relieved, shards get `replication`
    replicas where there are as many nodes. Left out is what cannot be done now, because a node
    that should take a replica is down or the shard lacks a live majority; a later plan has it.
    """
    _checked(replication)
    states = states_of(nodes, map)
    active = [n for n, state in states.items() if state.is_active]
    if not active:
        raise _nobody_left("Rebalancing")
    placed = assign(
        list(map.shards),
        active,
        replication,
        current={name: _leader_first(info) for name, info in map.shards.items()},
        zones=_zones(states),
    )
    targets = {}
    for name, info in map.shards.items():
        new = _padded(info, set(placed[name]), states, replication)
        can_copy = all(states[n].takes_replicas for n in new - set(info.members))
        if can_copy and has_quorum(info.members, states) and has_quorum(new, states):
            targets[name] = new
    return _steps(map, states, targets)


def plan_lost(map: ShardMap, nodes: Nodes, replication: int) -> list[Step]:
    """Re-found elsewhere the replicas of lost nodes; shards with the fewest live ones first.

    A lost replica that no node can take stays a member: its node may come back, and one member
    fewer would not make the rest survive more. Where it would (3 of 5 live), the shard shrinks.
    Shards whose majority is gone are left out (`shards_without_quorum` names them): nobody can
    seal their epoch.
    """
    _checked(replication)
    states = states_of(nodes, map)
    hit = [
        info
        for info in map.shards.values()
        if any(states[n].is_lost for n in info.members) and has_quorum(info.members, states)
    ]
    # Majorities stay: who comes is live, and lost members are all that goes.
    refounded = _refounded(map, states, hit, replication)
    return _steps(
        map,
        states,
        {s.id: _padded(s, refounded[s.id], states, replication) for s in hit},
    )


def shards_without_quorum(map: ShardMap, nodes: Nodes) -> list[str]:
    """The shards that no plan can help: a majority of their members must come back first."""
    states = states_of(nodes, map)
    return [name for name, info in map.shards.items() if not has_quorum(info.members, states)]


def preferred_changes(map: ShardMap, nodes: Nodes) -> dict[str, str]:
    """The preferred leaders to change, members as they are: as even as can be, as few as can be.

    A node that is draining or lost leads only shards that have no other member; one that is
    down for a while keeps its preferences.
    """
    states = states_of(nodes, map)
    able = {
        name: [n for n in info.members if states[n].is_active] or list(info.members)
        for name, info in map.shards.items()
    }
    was = {name: info.preferred_leader for name, info in map.shards.items()}
    leads = even_leaders(able, was)
    return {name: leads[name] for name in map.shards if leads[name] != was[name]}


# -- where replicas go ------------------------------------------------------------------


def _plan_without(
    map: ShardMap, nodes: Nodes, node: str, replication: int, doing: str, fewer_replicas: bool
) -> list[Step]:
    _checked(replication)
    states = states_of(nodes, map)
    states[node] = replace(_node(states, node, "node"), is_draining=True)
    takers = [n for n, state in states.items() if state.takes_replicas]
    hit = map.shards_of_node(node)
    if not (takers if hit else any(state.is_active for state in states.values())):
        raise _nobody_left(f"{doing} {node}")
    for info in hit:
        if not has_quorum(info.members, states):
            _must_have_quorums(states, info, info.members)
    targets = {}
    for name, new in _refounded(map, states, hit, replication, without=node).items():
        info = map.shards[name]
        wanted = min(replication, len(info.members))
        new = _padded(info, new, states, replication, without=node)
        if len(new) < wanted and not fewer_replicas:
            raise BadRequest(
                f"{doing} {node} leaves shard {name} with {len(new)} replicas of {wanted}: "
                f"that many nodes must be up to hold them, and there are {len(takers)} "
                f"({', '.join(takers)}).",
                hint="Add a node first, or ask for fewer replicas.",
                shard=name,
                node=node,
                nodes_needed=wanted,
            )
        _must_have_quorums(states, info, new)
        targets[name] = new
    return _steps(map, states, targets)


def _refounded(
    map: ShardMap,
    states: States,
    hit: Sequence[ShardInfo],
    replication: int,
    *,
    without: str | None = None,
) -> dict[str, set[str]]:
    """New members of the shards in `hit`: those neither lost nor `without`, and nodes that take
    over. No other replica moves. May be fewer than wanted.
    """
    active = {n: state.zone for n, state in states.items() if state.is_active}
    takers = {n for n, state in states.items() if state.takes_replicas}
    staying = {
        info.id: {n for n in info.members if n != without and not states[n].is_lost} for info in hit
    }
    if not takers:
        return staying
    ring = Ring(active)
    placement = Placement(ring, active, len(map.shards), min(replication, len(active)))
    for info in map.shards.values():
        # Draining members are about to go: they count for no zone and no load.
        placement.keep(info.id, [n for n in _leader_first(info) if n in active], trim=False)
    for info in _most_urgent_first(hit, states):
        copies = replication if without is None else min(replication, len(info.members))
        leaving = len(staying[info.id]) - len(placement.members[info.id])
        placement.fill(info.id, copies - leaving, takers=takers)
    return {info.id: staying[info.id] | placement.members[info.id] for info in hit}


def _padded(
    old: ShardInfo,
    new: set[str],
    states: States,
    replication: int,
    *,
    without: str | None = None,
) -> set[str]:
    """`new`, and as many of the old members as keep the shard from shrinking for want of nodes.

    Lost ones too, unless the live ones alone survive the loss of one more.
    """
    wanted = min(replication, len(old.members))
    spare = [n for n in old.members if n not in new and n != without]
    alive = [n for n in spare if not states[n].is_lost]
    padded = {*new, *alive[: max(0, wanted - len(new))]}
    lost = [n for n in spare if states[n].is_lost][: max(0, wanted - len(padded))]
    larger = {*padded, *lost}
    return padded if padded and majority(padded) < majority(larger) else larger


def _missed(
    map: ShardMap, states: States, old: ShardInfo, to: str, node: str
) -> tuple[bool, bool, bool, int, int, str]:
    """How much a member would be missed in favour of `to`: the least of these is let go."""
    state = states[node]
    zones = Counter(states[n].zone for n in (*old.members, to) if n != node)
    crowding = sum(count * count for count in zones.values())
    load = len(map.shards_of_node(node))
    return not state.is_lost, not state.is_draining, state.is_up, crowding, -load, node


# -- from members to steps --------------------------------------------------------------


def _steps(map: ShardMap, states: States, targets: Mapping[str, Collection[str]]) -> list[Step]:
    """The steps to these members. Only shards that change members may get another leader."""
    changed = {
        name: sorted(new) for name, new in targets.items() if {*new} != {*map.shards[name].members}
    }
    able = {}
    for name, info in map.shards.items():
        members = changed.get(name, info.members)
        best = [n for n in members if states[n].takes_replicas]
        able[name] = best or live(members, states) or list(members)
    was = {name: info.preferred_leader for name, info in map.shards.items()}
    leads = even_leaders(able, was, may_change=changed)
    return [
        Step(info.id, tuple(changed[info.id]), leads[info.id], _reason(info, changed[info.id]))
        for info in _most_urgent_first([map.shards[name] for name in changed], states)
    ]


def _most_urgent_first(shards: Sequence[ShardInfo], states: States) -> list[ShardInfo]:
    return sorted(shards, key=lambda s: (len(live(s.members, states)), s.slot_start))


def _reason(old: ShardInfo, new: Sequence[str]) -> str:
    come = " and ".join(n for n in new if n not in old.members)
    gone = " and ".join(n for n in old.members if n not in new)
    if come and gone:
        return f"{come} take{'' if ' and ' in come else 's'} over from {gone}"
    return f"{come} join{'' if ' and ' in come else 's'}" if come else f"{gone} gone, none replaces"


def _leader_first(info: ShardInfo) -> tuple[str, ...]:
    others = (n for n in info.members if n != info.preferred_leader)
    return (info.preferred_leader, *others)


def _zones(states: States) -> dict[str, str]:
    return {n: state.zone for n, state in states.items()}


# -- what is refused --------------------------------------------------------------------


def _must_have_quorums(states: States, old: ShardInfo, new: Collection[str]) -> None:
    for members, role in ((old.members, "members"), (tuple(sorted(new)), "new members")):
        alive = live(members, states)
        if len(alive) < majority(members):
            down = ", ".join(n for n in members if n not in alive)
            raise BadRequest(
                f"Shard {old.id} cannot change: {len(alive)} of its {len(members)} {role} are up, "
                f"and {majority(members)} are needed ({down} cannot be reached).",
                hint="Bring those nodes back, then try again.",
                shard=old.id,
            )


def _nobody_left(doing: str) -> BadRequest:
    return BadRequest(
        f"{doing} leaves no node that can hold a replica.",
        hint="Add a node that is up and not draining first.",
    )


def _checked(replication: int) -> None:
    if replication < 1:
        raise InvalidField(
            f"`replication` is {replication}.", hint="It is at least 1.", field="replication"
        )


def _shard(map: ShardMap, shard: str) -> ShardInfo:
    if shard not in map.shards:
        names = list(map.shards)
        raise InvalidField(
            f"There is no shard {shard!r}.",
            hint=f"There are {names[0]} to {names[-1]}."
            if len(names) > 1
            else f"There is {names[0]}.",
            field="shard",
        )
    return map.shards[shard]


def _node(states: States, node: str, field: str) -> NodeState:
    if node not in states:
        raise InvalidField(
            f"There is no node {node!r}.", hint=f"There are {', '.join(states)}.", field=field
        )
    return states[node]
