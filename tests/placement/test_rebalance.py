"""Rebalancing: bounded loads and well spread replicas, by few moves, each of them possible."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import (
    plan_rebalance,
    preferred_changes,
    shards_without_quorum,
)
from agentmem_cluster.preferred import even_leaders
from agentmem_cluster.shardmap import ShardMap
from agentmem_cluster.zones import fair_shares, load_bounds, zone_ranges
from tests.placement.worlds import (
    World,
    any_maps,
    applied,
    assert_executable,
    copied,
    loads,
    make_map,
    placed_map,
    troubled_worlds,
    worlds,
    zone_counts,
    zones,
)

NAMES = [f"n{i}" for i in range(1, 8)]
LABELS = st.sampled_from(["", "z1", "z2"])


@given(any_maps(NAMES), st.lists(LABELS, min_size=7, max_size=7), st.integers(1, 5))
def test_any_map_becomes_one_within_all_bounds(
    shard_map: ShardMap, labels: list[str], replication: int
) -> None:
    nodes = {n: NodeState(n, zone) for n, zone in zip(NAMES, labels, strict=True)}
    steps = plan_rebalance(shard_map, nodes, replication)
    assert_executable(steps, World(shard_map, nodes, replication))
    after = applied(shard_map, steps)
    ranges = zone_ranges(zones(nodes), replication)
    for info in after.shards.values():
        assert len(info.members) == replication
        for zone, count in zone_counts(info.members, nodes).items():
            assert ranges[zone].least <= count <= ranges[zone].most
    shares = fair_shares(zones(nodes), len(after.shards), replication)
    for node, load in loads(after, nodes).items():
        least, most = load_bounds(shares[node])
        assert least <= load <= most
    assert plan_rebalance(after, nodes, replication) == [], "nothing is left to do"


@given(any_maps(NAMES), st.integers(1, 5))
def test_without_zones_no_node_has_more_than_a_quarter_above_the_mean(
    shard_map: ShardMap, replication: int
) -> None:
    nodes = [NodeState(name) for name in NAMES]
    after = applied(shard_map, plan_rebalance(shard_map, nodes, replication))
    mean = len(after.shards) * replication / len(NAMES)
    assert max(loads(after, NAMES).values()) <= math.ceil(1.25 * mean)


@given(worlds())
def test_a_cluster_placed_by_the_ring_needs_no_rebalancing(world: World) -> None:
    assert plan_rebalance(world.map, world.nodes, world.replication) == []


@given(worlds(nodes_min=2, zones_max=0))
def test_an_added_node_takes_its_part_and_old_nodes_exchange_nothing(world: World) -> None:
    old, new = world.nodes, NodeState("new")
    # A node that has nothing yet is as new as the one that comes.
    assume(len(old) >= world.replication and min(loads(world.map, old).values()) > 0)
    nodes = {**old, "new": new}
    steps = plan_rebalance(world.map, nodes, world.replication)
    assert_executable(steps, replace(world, nodes=nodes))
    after = applied(world.map, steps)
    mean = len(after.shards) * world.replication / len(nodes)
    least, most = math.floor(mean / 1.25), math.ceil(1.25 * mean)
    gained = loads(after, ["new"])["new"]
    assert least <= gained <= most
    # Above the least only as far as others had to be brought below their bound. By rounding
    # that can be more than one node may take, and the rest has to go to old ones.
    over = sum(max(0, load - most) for load in loads(world.map, old).values())
    assert gained <= max(least, over)
    assert copied(steps, world.map) == max(gained, over)
    if over <= most:
        for step in steps:
            added = set(step.members) - set(world.map.shards[step.shard].members)
            assert added == {"new"}, "what moves moves to the new node"


def test_a_new_node_is_preferred_to_old_ones_that_are_as_empty() -> None:
    counts = {"n1": 3, "n2": 3, "n3": 2, "n4": 2, "n5": 2, "n6": 1, "n7": 1, "n8": 1, "n9": 1}
    holders = [node for node, count in counts.items() for _ in range(count)]
    shard_map = make_map({f"s{i:02d}": [node] for i, node in enumerate(holders)})
    steps = plan_rebalance(shard_map, [NodeState(n) for n in (*counts, "new")], 1)
    assert [step.members for step in steps] == [("new",), ("new",)]


def test_a_chain_of_moves_through_zones_relieves_a_node_that_none_can_relieve_alone() -> None:
    # All shards of `a` are in the zone of the b's already, which alone have room; c and d are
    # full. So c or d takes over from `a`, and a b from it.
    pairs = [["a", f"b{i % 3}"] for i in range(14)] + [["c", "d"]] * 10
    shard_map = make_map({f"s{i:02d}": pair for i, pair in enumerate(pairs)})
    nodes = [NodeState(n, n[0]) for n in ("a", "b0", "b1", "b2", "c", "d")]
    steps = plan_rebalance(shard_map, nodes, 2)
    after = loads(applied(shard_map, steps), ["a", "c", "d"])
    assert after == {"a": 10, "c": 10, "d": 10}
    assert copied(steps, shard_map) == 8, "four chains of two"


@given(worlds(nodes_min=2, nodes_max=8), st.sampled_from(["", "z0", "z1", "new"]))
def test_an_added_node_in_any_zone_moves_little_more_than_its_load(world: World, zone: str) -> None:
    nodes = {**world.nodes, "new": NodeState("new", zone)}
    assume(len(world.nodes) >= world.replication)
    steps = plan_rebalance(world.map, nodes, world.replication)
    assert_executable(steps, replace(world, nodes=nodes))
    after = applied(world.map, steps)
    before = fair_shares(zones(world.nodes), len(after.shards), world.replication)
    now = fair_shares(zones(nodes), len(after.shards), world.replication)
    # Where the new label changes how shards divide over zones, replicas of old zones move too.
    shifted = sum(max(0.0, now[n] - before[n]) for n in before)
    gained = loads(after, ["new"])["new"]
    assert copied(steps, world.map) <= 2 * (gained + shifted) + len(nodes)


@given(worlds(nodes_max=8), st.integers(1, 5))
def test_shards_grow_and_shrink_to_the_replication_wanted(world: World, replication: int) -> None:
    steps = plan_rebalance(world.map, world.nodes, replication)
    assert_executable(steps, world)
    wanted = min(replication, len(world.nodes))
    assert all(len(info.members) == wanted for info in applied(world.map, steps).shards.values())


@given(troubled_worlds())
def test_whatever_is_down_every_plan_can_be_carried_out(world: World) -> None:
    assume(any(state.is_active for state in world.nodes.values()))
    steps = plan_rebalance(world.map, world.nodes, world.replication)
    assert_executable(steps, world)
    stuck = set(shards_without_quorum(world.map, world.nodes))
    for step in steps:
        assert step.shard not in stuck
        old = world.map.shards[step.shard].members
        alive = [n for n in step.members if not world.nodes[n].is_lost]
        before = [n for n in old if not world.nodes[n].is_lost]
        assert len(alive) >= min(len(before), world.replication), "safety is never taken away"


@given(troubled_worlds())
def test_plans_for_a_troubled_cluster_come_to_an_end(world: World) -> None:
    assume(any(state.is_active for state in world.nodes.values()))
    shard_map = world.map
    for _ in range(4):
        steps = plan_rebalance(shard_map, world.nodes, world.replication)
        if not steps:
            return
        shard_map = applied(shard_map, steps)
    raise AssertionError("the fourth plan still had something to move")


@given(troubled_worlds(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_and_shards_does_not_matter(world: World, chance: object) -> None:
    assume(any(state.is_active for state in world.nodes.values()))
    states, shards = list(world.nodes.values()), list(world.map.shards.items())
    chance.shuffle(states)  # type: ignore[attr-defined]
    chance.shuffle(shards)  # type: ignore[attr-defined]
    again = plan_rebalance(ShardMap(1, dict(shards)), states, world.replication)
    assert again == plan_rebalance(world.map, world.nodes, world.replication)


@given(any_maps(NAMES), st.integers(1, 5))
def test_no_leaders_of_the_changed_shards_would_be_more_even(
    shard_map: ShardMap, replication: int
) -> None:
    steps = plan_rebalance(shard_map, [NodeState(name) for name in NAMES], replication)
    after = applied(shard_map, steps).shards.values()
    leads = {info.id: info.preferred_leader for info in after}
    members = {info.id: info.members for info in after}
    assert even_leaders(members, leads, may_change={s.shard for s in steps}) == leads


@pytest.mark.parametrize("count", range(3, 13))
def test_leaders_are_even_after_the_plan_and_the_changes_that_are_due(count: int) -> None:
    nodes = {f"n{i}": NodeState(f"n{i}") for i in range(1, count + 1)}
    shard_map = placed_map(nodes, 32, 3)
    nodes["new"] = NodeState("new")
    after = applied(shard_map, plan_rebalance(shard_map, nodes, 3))
    changes = preferred_changes(after, nodes)
    leads = Counter(dict.fromkeys(nodes, 0))
    leads.update(changes.get(s, info.preferred_leader) for s, info in after.shards.items())
    assert max(leads.values()) - min(leads.values()) <= 1
    assert len(changes) <= 32 // (count + 1) + 1, "few leaders change besides"


def test_a_fourth_node_of_four_takes_its_part_of_sixteen_shards_and_leads_some() -> None:
    nodes = {n: NodeState(n) for n in ("n1", "n2", "n3")}
    shard_map = placed_map(nodes, 16, 3)
    nodes["n4"] = NodeState("n4")
    steps = plan_rebalance(shard_map, nodes, 3)
    assert len(steps) == 9, "of a fair share of 12"
    assert all(step.reason.startswith("n4 takes over from n") for step in steps)
    assert sum(step.preferred_leader == "n4" for step in steps) == 4


def test_a_node_that_is_down_is_given_nothing_yet() -> None:
    nodes = {n: NodeState(n) for n in ("n1", "n2", "n3")}
    shard_map = placed_map(nodes, 16, 3)
    nodes["n4"] = NodeState("n4", is_up=False)
    assert plan_rebalance(shard_map, nodes, 3) == []


def test_a_shard_without_a_live_majority_is_left_alone() -> None:
    shard_map = make_map({"s00": ["n1", "n2", "n3"], "s01": ["n1", "n4", "n5"]})
    nodes = [
        NodeState("n1"),
        *(NodeState(n, is_lost=True, is_up=False) for n in ("n2", "n3")),
        NodeState("n4"),
        NodeState("n5", is_draining=True),
        NodeState("n6"),
        NodeState("n7"),
    ]
    steps = plan_rebalance(shard_map, nodes, 3)
    assert [step.shard for step in steps] == ["s01"]
    assert "n5" not in steps[0].members


def test_three_nodes_keep_three_replicas_while_one_of_them_is_lost_or_draining() -> None:
    shard_map = make_map({"s00": ["n1", "n2", "n3"]})
    lost = [NodeState("n1"), NodeState("n2"), NodeState("n3", is_lost=True, is_up=False)]
    assert plan_rebalance(shard_map, lost, 3) == []
    draining = [NodeState("n1"), NodeState("n2"), NodeState("n3", is_draining=True)]
    assert plan_rebalance(shard_map, draining, 3) == []
