"""The real planner over a simulated world: nodes are drained and come back, shards are spread.

What `agentmem_node.service.operations` does on a real machine: look at the map and at the nodes,
plan anew, begin the first step, until the plan is empty.
"""

from __future__ import annotations

import random

from agentmem_chaos.sim.moves import newest
from agentmem_chaos.sim.world import World
from agentmem_cluster import placement
from agentmem_cluster.errors import BadRequest
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.shardmap import ShardMap

LOOK_S = 0.25
REPLICATION = 3


class WorldPlanner:
    """`draining`: the node that is to be without replicas now."""

    def __init__(self, world: World, chance: random.Random, every_s: float, until_s: float) -> None:
        """Another node is drained every `every_s` or so, the last one before `until_s`."""
        self._world = world
        self._chance = chance
        self._every_s = every_s
        self._until_s = until_s
        self.draining = ""
        self.drains = 0
        self.steps = 0
        self.refused = 0
        world.schedule.after(chance.uniform(1.0, every_s), self._choose)
        world.schedule.after(1.0, self._look)

    def _choose(self) -> None:
        state = newest(list(self._world.movers.values()))
        if state is not None and state.map is not None:
            holders = set(state.map.nodes()) - {self.draining}
            self.draining = self._chance.choice(sorted(holders))
            self.drains += 1
        after_s = self._chance.uniform(0.5, 1.5) * self._every_s
        if self._world.schedule.now_s + after_s < self._until_s:
            self._world.schedule.after(after_s, self._choose)

    def _look(self) -> None:
        self._world.schedule.after(LOOK_S, self._look)
        leader = next(
            (n for n in self._world.movers.values() if n.membership and n.membership.leads), None
        )
        if leader is None or leader.paused or leader.membership is None:
            return
        view = leader.membership.view
        if view is None or view.changes:
            return
        for step in self.plan(view.map):
            self.steps += 1
            change = leader.membership.change(step.shard, step.members)
            leader.membership.begin(change, lambda _: None)
            return

    def plan(self, shard_map: ShardMap) -> list[placement.Step]:
        """What is to be done now; what cannot be done now is planned later."""
        states = [
            NodeState(name, is_draining=name == self.draining, is_up=node.alive)
            for name, node in self._world.nodes.items()
        ]
        try:
            if self.draining in shard_map.nodes():
                return placement.plan_drain(shard_map, states, self.draining, REPLICATION)
            return placement.plan_rebalance(shard_map, states, REPLICATION)
        except BadRequest:
            self.refused += 1
            return []

    def left(self) -> str:
        """What the plan still lacks at the end: "" when all is where it is to be."""
        state = newest(list(self._world.movers.values()))
        if state is None or state.map is None:
            return "nobody knows the map"
        steps = self.plan(state.map)
        return "; ".join(f"{step.shard} is to be on {', '.join(step.members)}" for step in steps)
