"""Moves, drains, removals and lost nodes: only what must move does, and only where it can."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentmem_cluster.errors import BadRequest, InvalidField
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import (
    plan_drain,
    plan_lost,
    plan_move,
    plan_rebalance,
    plan_remove,
    shards_without_quorum,
)
from agentmem_cluster.zones import zone_ranges
from tests.placement.worlds import (
    World,
    applied,
    assert_executable,
    loads,
    make_map,
    placed_map,
    troubled_worlds,
    worlds,
    zone_counts,
    zones,
)

THREE = [NodeState("n1"), NodeState("n2"), NodeState("n3")]
FOUR = [*THREE, NodeState("n4")]
ONE_SHARD = make_map({"s00": ["n1", "n2", "n3"]})


# -- one move ---------------------------------------------------------------------------


@given(worlds(nodes_min=2), st.data())
def test_a_move_changes_one_member_of_one_shard(world: World, data: st.DataObject) -> None:
    info = data.draw(st.sampled_from(sorted(world.map.shards.values(), key=lambda s: s.id)))
    others = sorted(set(world.nodes) - set(info.members))
    assume(others)
    to = data.draw(st.sampled_from(others))
    away_from = data.draw(st.none() | st.sampled_from(info.members))
    (step,) = plan_move(world.map, world.nodes, info.id, to, away_from=away_from)
    assert_executable([step], world)
    assert step.shard == info.id
    assert set(step.members) - set(info.members) == {to}
    (gone,) = set(info.members) - set(step.members)
    assert away_from in (None, gone)
    if info.preferred_leader not in (gone, step.preferred_leader):
        leads = Counter(other.preferred_leader for other in world.map.shards.values())
        assert leads[info.preferred_leader] >= leads[step.preferred_leader] + 2, "not in vain"


def test_a_move_says_who_takes_over_from_whom() -> None:
    (step,) = plan_move(ONE_SHARD, FOUR, "s00", "n4", away_from="n2")
    assert (step.members, step.reason) == (("n1", "n3", "n4"), "n4 takes over from n2")


@pytest.mark.parametrize(
    ("states", "gone"),
    [
        ([NodeState("n1"), NodeState("n2"), NodeState("n3", is_lost=True, is_up=False)], "n3"),
        ([NodeState("n1"), NodeState("n2", is_draining=True), NodeState("n3")], "n2"),
        ([NodeState("n1"), NodeState("n2", is_up=False), NodeState("n3")], "n2"),
        ([NodeState("n1", "a"), NodeState("n2", "b"), NodeState("n3", "c")], "n2"),
    ],
)
def test_a_move_lets_the_member_go_that_is_least_missed(states: list[NodeState], gone: str) -> None:
    (step,) = plan_move(ONE_SHARD, [*states, NodeState("n4", "b")], "s00", "n4")
    assert gone not in step.members


@pytest.mark.parametrize(
    ("shard", "to", "away_from", "message"),
    [
        ("s99", "n4", None, "no shard 's99'"),
        ("s00", "n9", None, "no node 'n9'"),
        ("s00", "n4", "n5", "'n5' has no replica of shard s00"),
    ],
)
def test_a_move_of_or_to_what_there_is_not_names_the_field(
    shard: str, to: str, away_from: str | None, message: str
) -> None:
    with pytest.raises(InvalidField, match=message) as refused:
        plan_move(ONE_SHARD, FOUR, shard, to, away_from=away_from)
    assert refused.value.details["field"] in {"shard", "to", "away_from"}
    assert refused.value.hint


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (NodeState("n4", is_draining=True), "is draining"),
        (NodeState("n4", is_lost=True, is_up=False), "is lost"),
        (NodeState("n4", is_up=False), "is down"),
    ],
)
def test_a_move_to_a_node_that_cannot_take_it_is_refused(target: NodeState, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        plan_move(ONE_SHARD, [*THREE, target], "s00", "n4")


def test_a_move_to_a_member_is_refused() -> None:
    with pytest.raises(BadRequest, match="on node n2 already"):
        plan_move(ONE_SHARD, FOUR, "s00", "n2")


def test_a_move_is_refused_while_the_old_members_cannot_seal_or_the_new_ones_not_serve() -> None:
    down = [NodeState("n1"), *(NodeState(n, is_up=False) for n in ("n2", "n3")), NodeState("n4")]
    with pytest.raises(BadRequest, match="1 of its 3 members are up, and 2 are needed"):
        plan_move(ONE_SHARD, down, "s00", "n4")
    one_down = [NodeState("n1"), NodeState("n2"), NodeState("n3", is_up=False), NodeState("n4")]
    (step,) = plan_move(ONE_SHARD, one_down, "s00", "n4", away_from="n1")
    assert step.members == ("n2", "n3", "n4")
    pair = make_map({"s00": ["n1", "n2"]})
    with pytest.raises(BadRequest, match=r"members are up, and 2 are needed \(n2 cannot"):
        half = [NodeState("n1"), NodeState("n2", is_up=False), NodeState("n3")]
        plan_move(pair, half, "s00", "n3")


# -- draining and removing --------------------------------------------------------------


@given(worlds(nodes_min=2), st.data(), st.sampled_from([plan_drain, plan_remove]))
def test_of_a_node_that_leaves_only_its_own_replicas_move(
    world: World, data: st.DataObject, plan: object
) -> None:
    gone = data.draw(st.sampled_from(sorted(world.nodes)))
    left = len(world.nodes) - 1
    replication = min(world.replication, left)
    steps = plan(world.map, world.nodes, gone, replication)  # type: ignore[operator]
    assert_executable(steps, world)
    assert {step.shard for step in steps} == {s.id for s in world.map.shards_of_node(gone)}
    for step in steps:
        old = world.map.shards[step.shard]
        assert set(old.members) - set(step.members) == {gone}
        assert len(step.members) == min(replication, len(old.members))
    assert plan(applied(world.map, steps), world.nodes, gone, replication) == []  # type: ignore[operator]


@given(worlds(nodes_min=3, zones_max=0), st.data())
def test_loads_stay_bounded_when_a_node_is_drained(world: World, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(world.nodes)))
    left = [n for n in world.nodes if n != gone]
    replication = min(world.replication, len(left))
    after = applied(world.map, plan_drain(world.map, world.nodes, gone, replication))
    mean = len(after.shards) * replication / len(left)
    before = loads(world.map, left)
    for node, load in loads(after, left).items():
        assert load <= max(math.ceil(1.25 * mean), before[node])


@given(worlds(nodes_min=3), st.data())
def test_a_drained_nodes_replicas_go_where_zones_have_fewest(
    world: World, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(world.nodes)))
    left = {n: s for n, s in world.nodes.items() if n != gone}
    replication = min(world.replication, len(left))
    for step in plan_drain(world.map, world.nodes, gone, replication):
        new = set(step.members) - set(world.map.shards[step.shard].members)
        count = zone_counts(set(step.members) - new, left)
        outside = {left[n].zone for n in left if n not in set(step.members) - new}
        for node in new:
            assert count[left[node].zone] == min(count[zone] for zone in outside)


@given(worlds(nodes_min=3), st.data())
def test_little_is_left_to_rebalance_after_a_drain(world: World, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(world.nodes)))
    replication = min(world.replication, len(world.nodes) - 1)
    steps = plan_drain(world.map, world.nodes, gone, replication)
    after = applied(world.map, steps)
    nodes = {**world.nodes, gone: replace(world.nodes[gone], is_draining=True)}
    final = applied(after, plan_rebalance(after, nodes, replication))
    assert gone not in final.nodes()
    left = {n: s for n, s in world.nodes.items() if n != gone}
    ranges = zone_ranges(zones(left), replication)
    for info in final.shards.values():
        for zone, count in zone_counts(info.members, left).items():
            assert ranges[zone].least <= count <= ranges[zone].most


def test_a_drain_that_leaves_too_few_nodes_says_how_many_are_needed() -> None:
    for plan in (plan_drain, plan_remove):
        with pytest.raises(BadRequest, match="2 replicas of 3: that many nodes must be up") as no:
            plan(ONE_SHARD, THREE, "n2", 3)
        assert no.value.details["nodes_needed"] == 3
        assert "fewer replicas" in no.value.hint
        (step,) = plan(ONE_SHARD, THREE, "n2", 2)
        assert (step.members, step.reason) == (("n1", "n3"), "n2 gone, none replaces")
        assert plan(ONE_SHARD, THREE, "n2", 3, fewer_replicas=True) == [step]


def test_a_lost_member_cannot_stand_in_for_a_replica_that_is_drained() -> None:
    nodes = [NodeState("n1"), NodeState("n2"), NodeState("n3", is_lost=True, is_up=False)]
    with pytest.raises(BadRequest, match=r"2 are needed|replicas of 3"):
        plan_drain(ONE_SHARD, nodes, "n2", 3)


def test_a_drain_moves_nothing_else_even_when_every_node_that_could_take_over_is_full() -> None:
    pairs = [("n1", "n5"), ("n2", "n5"), ("n3", "n5"), ("n4", "n5")]
    pairs += [("n1", "n2"), ("n1", "n3"), ("n1", "n4")]
    pairs += [("n2", "n3"), ("n2", "n4"), ("n3", "n4")] * 19
    shard_map = make_map({f"s{i:02d}": list(pair) for i, pair in enumerate(pairs)})
    full = math.ceil(1.25 * 2 * len(pairs) / 4)
    assert set(loads(shard_map, ["n2", "n3", "n4"]).values()) == {full}
    first, *others = plan_drain(shard_map, [*FOUR, NodeState("n5")], "n5", 2)
    assert first.shard == "s00" and "n1" in first.members, "only n1 has room, and has it already"
    assert [step.members for step in others] == [("n1", "n2"), ("n1", "n3"), ("n1", "n4")]


def test_a_drain_is_refused_when_members_that_are_down_would_be_half_of_those_left() -> None:
    nodes = [*THREE[:2], NodeState("n3", is_up=False)]
    with pytest.raises(BadRequest, match="1 of its 2 new members are up, and 2 are needed"):
        plan_drain(ONE_SHARD, nodes, "n2", 2)


def test_the_last_node_cannot_leave() -> None:
    alone = make_map({"s00": ["n1"]})
    for plan in (plan_drain, plan_remove):
        for nodes in ([NodeState("n1")], [NodeState("n1"), NodeState("n2", is_draining=True)]):
            with pytest.raises(BadRequest, match="leaves no node"):
                plan(alone, nodes, "n1", 1, fewer_replicas=True)


def test_a_node_that_is_down_can_be_removed_while_majorities_are_up() -> None:
    nodes = [*THREE[:2], NodeState("n3", is_lost=True, is_up=False), NodeState("n4")]
    (step,) = plan_remove(ONE_SHARD, nodes, "n3", 3)
    assert step.members == ("n1", "n2", "n4")
    two_down = [NodeState("n1"), NodeState("n2", is_up=False), *nodes[2:]]
    with pytest.raises(BadRequest, match="1 of its 3 members are up"):
        plan_remove(ONE_SHARD, two_down, "n3", 3)


def test_a_node_without_replicas_leaves_without_a_step() -> None:
    assert plan_remove(ONE_SHARD, FOUR, "n4", 3) == []


def test_unknown_nodes_and_nonsense_are_refused() -> None:
    with pytest.raises(InvalidField, match="no node 'n9'"):
        plan_drain(ONE_SHARD, THREE, "n9", 3)
    with pytest.raises(InvalidField, match="`replication` is 0"):
        plan_drain(ONE_SHARD, FOUR, "n1", 0)
    with pytest.raises(InvalidField, match="twice"):
        plan_rebalance(ONE_SHARD, [*THREE, NodeState("n1")], 3)
    with pytest.raises(BadRequest, match="no node that can hold"):
        plan_rebalance(ONE_SHARD, [replace(node, is_draining=True) for node in THREE], 3)


# -- lost nodes -------------------------------------------------------------------------


@given(worlds(nodes_min=2), st.data())
def test_a_lost_nodes_replicas_are_founded_elsewhere_and_nothing_else_moves(
    world: World, data: st.DataObject
) -> None:
    lost = data.draw(st.sets(st.sampled_from(sorted(world.nodes)), min_size=1, max_size=2))
    nodes = {
        n: replace(state, is_lost=n in lost, is_up=n not in lost)
        for n, state in world.nodes.items()
    }
    world = replace(world, nodes=nodes)
    steps = plan_lost(world.map, nodes, world.replication)
    assert_executable(steps, world)
    room = len(nodes) - len(lost)
    stuck = set(shards_without_quorum(world.map, nodes))
    for info in world.map.shards.values():
        step = next((s for s in steps if s.shard == info.id), None)
        if step is None:
            hit = set(info.members) & lost
            assert not hit or info.id in stuck or room < len(info.members)
        else:
            assert set(info.members) - set(step.members) <= lost
    assert plan_lost(applied(world.map, steps), nodes, world.replication) == []


@given(troubled_worlds())
def test_the_shards_with_the_fewest_live_replicas_come_first(world: World) -> None:
    steps = plan_lost(world.map, world.nodes, world.replication)
    assert_executable(steps, world)
    alive = [
        sum(world.nodes[n].is_live for n in world.map.shards[step.shard].members) for step in steps
    ]
    assert alive == sorted(alive)
    after = applied(world.map, steps)
    assert plan_lost(after, world.nodes, world.replication) == []


@given(troubled_worlds())
def test_no_plan_for_lost_nodes_makes_a_shard_survive_less(world: World) -> None:
    def survives(members: tuple[str, ...]) -> int:
        """How many more live members can go."""
        return sum(world.nodes[n].is_live for n in members) - len(members) // 2 - 1

    for step in plan_lost(world.map, world.nodes, world.replication):
        old = world.map.shards[step.shard].members
        if len(old) <= world.replication:
            assert survives(step.members) >= survives(old)


def test_three_nodes_of_which_one_is_lost_wait_for_it() -> None:
    nodes = [*THREE[:2], NodeState("n3", is_lost=True, is_up=False)]
    assert plan_lost(ONE_SHARD, nodes, 3) == []


def test_three_live_of_five_become_three_of_three() -> None:
    five = make_map({"s00": ["n1", "n2", "n3", "n4", "n5"]})
    nodes = [*THREE, *(NodeState(n, is_lost=True, is_up=False) for n in ("n4", "n5"))]
    (step,) = plan_lost(five, nodes, 5)
    assert step.members == ("n1", "n2", "n3")


def test_a_member_that_nobody_knows_any_more_is_lost() -> None:
    (step,) = plan_lost(ONE_SHARD, [*THREE[:2], NodeState("n4")], 3)
    assert step.members == ("n1", "n2", "n4")
    assert step.reason == "n4 takes over from n3"


def test_a_draining_member_still_counts_while_a_lost_one_is_replaced_but_does_not_lead() -> None:
    shard_map = make_map({"s00": ["n3", "n1", "n2"], "s01": ["n1"], "s02": ["n1"]})
    nodes = [
        NodeState("n1"),
        NodeState("n2", is_draining=True),
        NodeState("n3", is_lost=True, is_up=False),
        NodeState("n4"),
    ]
    (step,) = plan_lost(shard_map, nodes, 3)
    assert step.members == ("n1", "n2", "n4")
    assert step.preferred_leader == "n4"
    (step,) = plan_lost(shard_map, [*nodes, NodeState("n5")], 3)
    assert len(step.members) == 3, "two are enough beside the one that drains"


def test_a_shard_whose_majority_is_lost_is_named_and_left_out() -> None:
    nodes = [NodeState("n1"), NodeState("n4")]
    assert plan_lost(ONE_SHARD, nodes, 3) == []
    assert shards_without_quorum(ONE_SHARD, nodes) == ["s00"]


def test_a_node_that_is_down_for_a_moment_keeps_its_replicas() -> None:
    nodes = [*THREE[:2], NodeState("n3", is_up=False), NodeState("n4")]
    assert plan_lost(ONE_SHARD, nodes, 3) == []


def test_the_replicas_of_a_lost_node_are_shared_by_the_others() -> None:
    nodes = {f"n{i}": NodeState(f"n{i}") for i in range(1, 7)}
    shard_map = placed_map(nodes, 64, 3)
    nodes["n3"] = NodeState("n3", is_lost=True, is_up=False)
    steps = plan_lost(shard_map, nodes, 3)
    taken = Counter(
        n for step in steps for n in set(step.members) - set(shard_map.shards[step.shard].members)
    )
    assert sum(taken.values()) == len(shard_map.shards_of_node("n3"))
    after = loads(applied(shard_map, steps), nodes)
    assert after["n3"] == 0
    assert max(after.values()) <= math.ceil(1.25 * 64 * 3 / 5)
