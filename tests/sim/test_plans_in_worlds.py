"""The planner's steps reach their end, although nodes crash, are cut off and lose disks."""

from __future__ import annotations

import dataclasses
import random

import pytest

from agentmem_chaos.sim.moves import newest
from agentmem_chaos.sim.plan import Fault
from agentmem_chaos.sim.planning import REPLICATION, WorldPlanner
from agentmem_chaos.sim.planted import MOVING
from agentmem_chaos.sim.world import World

FAULTS = {
    Fault.KILL: 4.0,
    Fault.POWER_LOSS: 6.0,
    Fault.CUT_LEADER: 4.0,
    Fault.BREAK_SESSION: 2.0,
    Fault.LOSE_DISK: 10.0,
}
WORLDS = dataclasses.replace(MOVING, nodes=5, faults=FAULTS, seconds=60.0)


@pytest.mark.parametrize("seed", range(1, 11))
def test_a_node_that_is_drained_is_empty_in_the_end_and_the_rest_is_even(seed: int) -> None:
    world = World(WORLDS.plan(seed))
    # The last one is chosen when all is healed, and has half a minute.
    calm_s = world.plan.calm_at_s
    planner = WorldPlanner(world, random.Random(seed), every_s=calm_s / 4, until_s=calm_s)
    result = world.run()
    assert result.violations == []
    assert planner.drains >= 2
    assert planner.steps >= 2

    assert planner.left() == ""
    state = newest(list(world.movers.values()))
    assert state is not None and state.map is not None
    assert planner.draining not in state.map.nodes()
    assert {len(info.members) for info in state.map.shards.values()} == {REPLICATION}
