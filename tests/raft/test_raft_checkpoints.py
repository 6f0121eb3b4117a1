"""When the groups of a node make their state durable: in turn, and none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem_cluster.raft.settings import RaftSettings

GROUPS = tuple(f"g{number}" for number in range(6))
SETTINGS = RaftSettings(checkpoint_s=1.0, checkpoint_bytes=20_000)


@pytest.fixture
def busy(world: Any) -> Any:
    """One node with six groups, each of which has applied something."""
    made = world("a", groups=GROUPS, settings=SETTINGS)
    made.settle()
    for group in GROUPS:
        made.propose("a", b"first", group)
    made.settle()
    return made


def outstanding(world: Any, seconds: float) -> list[Any]:
    """The checkpoints that the node asks for meanwhile; none of them is run."""
    core, jobs = world.cores["a"], []
    until_s = world.clock.now_s + seconds
    while world.clock.now_s < until_s:
        ready = core.tick()
        if ready is not None and ready.job is not None:
            ready.job.run()
            core.synced(ready)
        jobs += core.take_checkpoints()
        wake_s = core.next_wakeup()
        assert wake_s > world.clock.now_s or core.tick() is None
        world.clock.now_s += 0.01
    return jobs


def test_one_checkpoint_of_a_node_is_made_at_a_time(busy: Any) -> None:
    assert len(outstanding(busy, 3.0)) == 1


def test_a_node_that_waits_for_a_checkpoint_sleeps_until_its_next_beat(busy: Any) -> None:
    outstanding(busy, 2.0)
    busy.cores["a"].tick()
    assert busy.cores["a"].next_wakeup() > busy.clock.now_s


def test_every_group_has_its_turn_however_much_one_of_them_writes(busy: Any) -> None:
    core, order = busy.cores["a"], []
    until_s = busy.clock.now_s + 4.0
    while busy.clock.now_s < until_s:
        busy.propose("a", bytes(25_000), "g0")  # due for its size, each time
        for checkpoint in outstanding(busy, 0.05):
            order.append(checkpoint.group_id)
            checkpoint.job.run()
            core.checkpointed(checkpoint)
    assert set(order) == set(GROUPS)
    machines = busy.machines
    assert all(machines["a", g].durable_index > 0 for g in GROUPS)


def test_a_checkpoint_that_waits_for_room_holds_up_no_other(busy: Any) -> None:
    busy.machines["a", "g0"].checkpoint_broken = OSError(28, "No space left on device")
    busy.run(4.0)
    for group in GROUPS[1:]:
        machine = busy.machines["a", group]
        assert machine.durable_index == machine.applied_index
