"""Preferred leaders: as even as members allow, and never changed in vain."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import preferred_changes
from agentmem_cluster.preferred import even_leaders
from agentmem_cluster.shardmap import ShardMap
from tests.placement.worlds import any_maps, make_map

NODES = ["n1", "n2", "n3", "n4", "n5"]


@st.composite
def small_groups(draw: st.DrawFn) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(members, current leaders) of at most six shards, so that every choice can be tried."""
    subset = st.lists(st.sampled_from(NODES), min_size=1, max_size=3, unique=True)
    members = {f"s{i}": tuple(sorted(draw(subset))) for i in range(draw(st.integers(1, 6)))}
    current = {}
    for shard, nodes in members.items():
        leader = draw(st.none() | st.sampled_from([*nodes, "gone"]))
        if leader is not None:
            current[shard] = leader
    return members, current


def cost(
    leads: dict[str, str], members: dict[str, tuple[str, ...]], current: dict[str, str]
) -> tuple[int, int]:
    """(squares of the leaderships, changes): less is better, squares first."""
    squares = sum(n * n for n in Counter(leads.values()).values())
    kept = (s for s in members if current.get(s) in members[s])
    return squares, sum(leads[s] != current[s] for s in kept)


@given(small_groups())
def test_no_choice_is_more_even_and_none_as_even_has_fewer_changes(
    groups: tuple[dict[str, tuple[str, ...]], dict[str, str]],
) -> None:
    members, current = groups
    leads = even_leaders(members, current)
    assert set(leads) == set(members)
    assert all(leads[shard] in members[shard] for shard in members)
    best = min(
        cost(dict(zip(members, choice, strict=True)), members, current)
        for choice in itertools.product(*members.values())
    )
    assert cost(leads, members, current) == best


@given(small_groups(), st.data())
def test_only_the_shards_that_may_change_do(
    groups: tuple[dict[str, tuple[str, ...]], dict[str, str]], data: st.DataObject
) -> None:
    members, current = groups
    current = {s: current.get(s, members[s][0]) for s in members}
    free = data.draw(st.sets(st.sampled_from(sorted(members))))
    leads = even_leaders(members, current, may_change=free)
    assert all(leads[s] == current[s] for s in members if s not in free)
    best = min(
        cost(leads | dict(zip(sorted(free), choice, strict=True)), members, current)
        for choice in itertools.product(*(members[s] for s in sorted(free)))
    )
    assert cost(leads, members, current) == best


@given(any_maps(NODES))
@settings(max_examples=50)
def test_changes_once_made_are_all_that_are_due(shard_map: ShardMap) -> None:
    nodes = [NodeState(name) for name in NODES]
    changes = preferred_changes(shard_map, nodes)
    shards = {
        name: replace(info, preferred_leader=changes.get(name, info.preferred_leader))
        for name, info in shard_map.shards.items()
    }
    assert all(
        shards[name].preferred_leader != shard_map.shards[name].preferred_leader for name in changes
    )
    assert preferred_changes(ShardMap(2, shards), nodes) == {}


def test_sixteen_shards_on_three_nodes_are_led_by_five_or_six_each() -> None:
    shard_map = make_map({f"s{i:02d}": ["n1", "n2", "n3"] for i in range(16)})
    changes = preferred_changes(shard_map, [NodeState(n) for n in ("n1", "n2", "n3")])
    leads = Counter(changes.get(s, info.preferred_leader) for s, info in shard_map.shards.items())
    assert sorted(leads.values()) == [5, 5, 6]
    assert len(changes) == 10


def test_a_draining_or_lost_node_leads_only_what_nobody_else_can() -> None:
    shard_map = make_map({"s00": ["n1", "n2"], "s01": ["n1"], "s02": ["n3", "n2"]})
    nodes = [NodeState("n1", is_draining=True), NodeState("n2"), NodeState("n3", is_lost=True)]
    assert preferred_changes(shard_map, nodes) == {"s00": "n2", "s02": "n2"}


def test_a_node_that_restarts_keeps_its_preferences() -> None:
    shard_map = make_map({"s00": ["n1", "n2"], "s01": ["n2", "n1"]})
    assert preferred_changes(shard_map, [NodeState("n1", is_up=False), NodeState("n2")]) == {}
