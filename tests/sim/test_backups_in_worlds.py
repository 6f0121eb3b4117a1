"""Backups of shards that move, crash and lose disks come back as the replicas were."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem_chaos.sim.backups import WorldBackups
from agentmem_chaos.sim.plan import Engine, Fault
from agentmem_chaos.sim.planted import MOVING
from agentmem_chaos.sim.world import SHARED_MEMORY, World
from agentmem_node.backup.objects import open_store

FAULTS = {**MOVING.faults, Fault.LOSE_DISK: 8.0, Fault.WALL_JUMP: 4.0, Fault.SPLIT: 4.0}
WORLDS = dataclasses.replace(MOVING, engine=Engine.SHARD, faults=FAULTS)
TAKEN_AT_S = (3.0, 9.0, 15.0)
MOMENTS = 3
# Worlds in which a moment is restored over a split: a plan draws whether there is one, and when.
SPLIT = (1, 3, 6, 7)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: what is looked at here is not the disk."""
    in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as path:
        yield Path(path)


@pytest.mark.parametrize("seed", range(1, 11))
def test_any_moment_of_a_world_is_restored_with_the_digest_that_replicas_had(
    seed: int, folder: Path
) -> None:
    world = World(WORLDS.plan(seed))
    store = open_store(str(folder / "store"))
    backups = WorldBackups(world, store, random.Random(seed))
    for at_s in TAKEN_AT_S:
        backups.take_at(at_s)
    result = world.run()
    assert result.violations == []
    assert result.moves > 0

    restored = backups.check(folder / "back", MOMENTS)
    assert restored.backups > 0
    assert restored.moments > 0
    assert restored.exact > restored.moments / 2
    assert restored.splits > 0 or seed not in SPLIT
