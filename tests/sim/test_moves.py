"""Shards that move in a simulated world, one event at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from agentmem_chaos.sim.clients import Call, Fate
from agentmem_chaos.sim.moves import newest, unfinished
from agentmem_chaos.sim.moving_node import MovingNode
from agentmem_chaos.sim.plan import Engine
from agentmem_chaos.sim.planted import Worlds
from agentmem_chaos.sim.world import World
from agentmem_cluster.epochs.change import Change

NODES = 5


@pytest.fixture(params=list(Engine))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Without faults, and with clients that go on all the time."""
    plan = Worlds({}, nodes=NODES, seconds=60.0, engine=request.param, moves=True).plan(1)
    world = World(plan)
    for node in world.nodes.values():
        node.boot_later(0.0)
    for client in world.clients:
        client.start()
    wait(world, lambda: unfinished(world.movers) == "")
    yield world
    world.close()
    assert world.judge.violations == []


def wait(world: World, until: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline_s = world.schedule.now_s + seconds
    while not until():
        assert world.schedule.now_s < deadline_s, unfinished(world.movers)
        world.schedule.run_until(world.schedule.now_s + 0.05)
        assert world.judge.violations == []


def members(world: World) -> tuple[str, ...]:
    state = newest(list(world.movers.values()))
    assert state is not None and state.map is not None
    return state.map.shards["s00"].members


def epoch(world: World) -> int:
    state = newest(list(world.movers.values()))
    assert state is not None and state.map is not None
    return state.map.shards["s00"].epoch


def begin(world: World, to: tuple[str, ...]) -> Change:
    leader = next(n for n in world.movers.values() if n.membership and n.membership.leads)
    assert leader.membership is not None
    change = leader.membership.change("s00", to)
    answers: list[object] = []
    leader.membership.begin(change, answers.append)
    wait(world, lambda: bool(answers))
    assert answers == [["ok", ""]]
    return change


def others(world: World) -> tuple[str, ...]:
    """As many members as there are, as few of them the old ones as can be."""
    old = members(world)
    return tuple(sorted([*(n for n in world.nodes if n not in old), old[0]]))


def test_a_shard_moves_to_other_nodes_while_it_is_written_and_nobody_waits_long(
    world: World,
) -> None:
    before = len(world.calls)
    to = others(world)
    begin(world, to)
    wait(world, lambda: epoch(world) == 2 and unfinished(world.movers) == "")
    assert members(world) == to
    (pause_s,) = world.epochs.pauses_s
    assert pause_s < 0.5
    wait(world, lambda: any(c.fate is Fate.ANSWERED and c.invoked_s > pause_s for c in world.calls))
    during: list[Call] = world.calls[before:]
    assert all(call.fate in (Fate.ANSWERED, Fate.PENDING) for call in during)


def victim(world: World) -> MovingNode:
    """A member that does not vote in the meta group: nobody replaces voters here."""
    return next(world.movers[name] for name in members(world) if name not in NODES_OF_META)


NODES_OF_META = ("n1", "n2", "n3")


def test_a_lost_disk_is_replaced_by_a_new_epoch_and_never_votes_in_the_old_one(
    world: World,
) -> None:
    begin(world, ("n2", "n4", "n5"))
    wait(world, lambda: epoch(world) == 2 and unfinished(world.movers) == "")
    node = victim(world)
    incarnation = node.incarnation
    node.lose_disk("lost its disk")
    node.boot_later(0.5)
    wait(world, lambda: epoch(world) == 3 and unfinished(world.movers) == "", 20.0)
    assert node.incarnation != incarnation
    assert node.is_whole("s00", 3)
    # That it took no part in epoch 2 again is what the world's own rule says: no violation.


def test_a_disk_that_is_lost_in_the_midst_of_a_change_does_not_hold_it_up(world: World) -> None:
    begin(world, ("n2", "n4", "n5"))
    wait(world, lambda: epoch(world) == 2 and unfinished(world.movers) == "")
    begin(world, ("n3", "n4", "n5"))
    node = world.movers["n5"]  # it was to go on with what it has
    node.lose_disk("lost its disk")
    node.boot_later(0.2)
    wait(world, lambda: epoch(world) > 2 and unfinished(world.movers) == "", 30.0)
    assert node.is_whole("s00", epoch(world))
