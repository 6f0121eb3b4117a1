"""The same plan from every process: nothing follows the order in which sets are hashed."""

from __future__ import annotations

import os
import subprocess
import sys

PLANS = """
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import plan_drain, plan_lost, plan_rebalance, preferred_changes
from agentmem_cluster.ring import assign, SLOTS
from agentmem_cluster.shardmap import ShardInfo, ShardMap

old = {f"n{i}": NodeState(f"n{i}", f"z{i % 3}") for i in range(7)}
names = [f"s{i:02d}" for i in range(32)]
placed = assign(names, sorted(old), 3, zones={n: s.zone for n, s in old.items()})
shards = {
    name: ShardInfo(name, 1, tuple(sorted(m)), m[0], i * SLOTS // 32, (i + 1) * SLOTS // 32)
    for i, (name, m) in enumerate(placed.items())
}
map = ShardMap(1, shards)
lost = {**old, "n2": NodeState("n2", "z2", is_lost=True, is_up=False)}
print(map, plan_rebalance(map, {**old, "n9": NodeState("n9", "z3")}, 4))
print(plan_drain(map, old, "n1", 3), plan_lost(map, lost, 3), preferred_changes(map, lost))
"""


def planned(seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PLANS],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_plans_do_not_depend_on_how_a_process_hashes() -> None:
    first = planned("1")
    assert "takes over from" in first
    assert planned("2") == planned("3") == first
