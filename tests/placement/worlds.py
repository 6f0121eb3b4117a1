"""Clusters to plan for: nodes, zones, and a map that the ring would have made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import Step
from agentmem_cluster.ring import SLOTS, assign
from agentmem_cluster.shardmap import ShardInfo, ShardMap


@dataclass(frozen=True)
class World:
    map: ShardMap
    nodes: dict[str, NodeState]
    replication: int


def make_map(placed: Mapping[str, Sequence[str]]) -> ShardMap:
    """A map with these members, the preferred leader first, over equal ranges of slots."""
    names = sorted(placed)
    return ShardMap(
        version=1,
        shards={
            name: ShardInfo(
                name,
                1,
                tuple(sorted(placed[name])),
                placed[name][0],
                i * SLOTS // len(names),
                (i + 1) * SLOTS // len(names),
            )
            for i, name in enumerate(names)
        },
    )


def zones(nodes: Mapping[str, NodeState]) -> dict[str, str]:
    return {name: state.zone for name, state in nodes.items()}


def placed_map(nodes: Mapping[str, NodeState], shards: int, replication: int) -> ShardMap:
    names = [f"s{i:02d}" for i in range(shards)]
    return make_map(assign(names, sorted(nodes), replication, zones=zones(nodes)))


@st.composite
def worlds(
    draw: st.DrawFn, *, nodes_min: int = 1, nodes_max: int = 12, zones_max: int = 4
) -> World:
    """Healthy clusters, placed by the ring."""
    count = draw(st.integers(nodes_min, nodes_max))
    labels = draw(st.integers(0, zones_max))
    zone = st.sampled_from([f"z{i}" for i in range(labels)]) if labels else st.just("")
    nodes = {f"n{i}": NodeState(f"n{i}", draw(zone)) for i in range(1, count + 1)}
    replication = draw(st.integers(1, 5))
    return World(placed_map(nodes, draw(st.integers(1, 40)), replication), nodes, replication)


@st.composite
def any_maps(draw: st.DrawFn, nodes: Sequence[str], shards_max: int = 20) -> ShardMap:
    """Members at random: maps that no plan of ours would have made."""
    members = st.lists(st.sampled_from(nodes), min_size=1, max_size=4, unique=True)
    count = draw(st.integers(1, shards_max))
    return make_map({f"s{i:02d}": draw(members) for i in range(count)})


@st.composite
def troubled_worlds(draw: st.DrawFn) -> World:
    """Any map over nodes of which some are down, lost or draining."""
    names = [f"n{i}" for i in range(1, draw(st.integers(1, 8)) + 1)]
    nodes = {}
    for name in names:
        lost = draw(st.integers(0, 5)) == 0
        nodes[name] = NodeState(
            name,
            draw(st.sampled_from(["", "z1", "z2", "z3"])),
            is_draining=draw(st.integers(0, 5)) == 0,
            is_lost=lost,
            is_up=not lost and draw(st.integers(0, 5)) > 0,
        )
    return World(draw(any_maps(names)), nodes, draw(st.integers(1, 5)))


def applied(shard_map: ShardMap, steps: Iterable[Step]) -> ShardMap:
    """The map after these epoch changes."""
    shards = dict(shard_map.shards)
    for step in steps:
        shards[step.shard] = replace(
            shards[step.shard],
            epoch=shards[step.shard].epoch + 1,
            members=step.members,
            preferred_leader=step.preferred_leader,
        )
    return ShardMap(shard_map.version + 1, shards)


def loads(shard_map: ShardMap, nodes: Iterable[str]) -> dict[str, int]:
    return {node: len(shard_map.shards_of_node(node)) for node in nodes}


def copied(steps: Iterable[Step], shard_map: ShardMap) -> int:
    """Replicas that must be copied to a node that has none of the shard."""
    return sum(len(set(s.members) - set(shard_map.shards[s.shard].members)) for s in steps)


def zone_counts(members: Iterable[str], nodes: Mapping[str, NodeState]) -> Counter[str]:
    return Counter(nodes[node].zone for node in members)


def assert_executable(steps: Sequence[Step], world: World) -> None:
    """One at a time, in order, stopping anywhere: every step seals and founds with a majority."""

    def alive(members: Sequence[str]) -> bool:
        live = [n for n in members if world.nodes[n].is_up and not world.nodes[n].is_lost]
        return 2 * len(live) > len(members)

    assert len({step.shard for step in steps}) == len(steps)
    shard_map = world.map
    for step in steps:
        old = shard_map.shards[step.shard]
        assert alive(old.members), "the old epoch can be sealed"
        assert alive(step.members), "the new epoch can serve"
        assert list(step.members) == sorted(set(step.members)), "one replica a node"
        assert set(step.members) != set(old.members), "a change of leader is no step"
        assert step.reason
        new = set(step.members) - set(old.members)
        assert all(
            world.nodes[n].is_up and not world.nodes[n].is_lost and not world.nodes[n].is_draining
            for n in new
        ), "only a node that is up and stays can copy a snapshot"
        shard_map = applied(shard_map, [step])  # refuses what is no valid map
