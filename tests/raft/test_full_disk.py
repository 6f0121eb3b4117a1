"""A disk without room: writes are refused, reads go on, and nobody restarts anything."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from agentmem_cluster.errors import DiskFull
from agentmem_cluster.raft.api import Applied
from agentmem_cluster.raft.settings import RaftSettings

SETTINGS = RaftSettings(checkpoint_s=1.0, disk_retry_s=0.5)
NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def alone(world: Any) -> Any:
    """One node that leads its group of one and has applied a command."""
    made = world("a", settings=SETTINGS)
    made.leader()
    assert isinstance(applied(made, b"first"), Applied)
    return made


def applied(world: Any, command: bytes, node: str = "a") -> Any:
    told = world.propose(node, command)
    world.run_until(lambda: told.outcomes)
    return told.one


@pytest.mark.parametrize("error", [NO_ROOM, OSError(errno.EDQUOT, "quota"), DiskFull("no room")])
def test_a_checkpoint_without_room_is_tried_again_and_the_node_goes_on(
    alone: Any, error: Exception
) -> None:
    core, machine = alone.cores["a"], alone.machines["a", "g"]
    machine.checkpoint_broken = error
    alone.run(3.0)
    assert core.fatal is None
    assert machine.durable_index == 0
    assert core.counters["checkpoints_without_room"] in range(3, 8)  # once per disk_retry_s
    assert isinstance(applied(alone, b"second"), Applied)
    machine.checkpoint_broken = None
    alone.run(2.5)
    assert machine.durable_index == machine.applied_index
    assert core.fatal is None


def test_a_checkpoint_that_waits_for_room_is_the_same_one_each_time(alone: Any) -> None:
    machine = alone.machines["a", "g"]
    machine.checkpoint_broken = NO_ROOM
    alone.run(5.0)
    assert machine.checkpoints == 1  # a machine has one outstanding, and is never told of failures


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("a bug")])
def test_a_checkpoint_that_fails_for_any_other_reason_stops_the_node(
    alone: Any, error: Exception
) -> None:
    alone.machines["a", "g"].checkpoint_broken = error
    alone.run(1.5)
    assert alone.cores["a"].fatal is error


def test_a_group_that_left_meanwhile_takes_its_waiting_checkpoint_along(alone: Any) -> None:
    core, machine = alone.cores["a"], alone.machines["a", "g"]
    machine.checkpoint_broken = NO_ROOM
    alone.run(1.5)
    core.remove_group("g")
    machine.checkpoint_broken = None
    alone.run(3.0)
    assert core.fatal is None
    assert machine.durable_index == 0


def test_a_state_machine_without_room_refuses_writes_serves_reads_and_goes_on(alone: Any) -> None:
    core, machine = alone.cores["a"], alone.machines["a", "g"]
    machine.broken = DiskFull("no room")
    caught = alone.propose("a", b"second")  # in the log: applied once there is room
    alone.run(0.2)
    refused = alone.propose("a", b"third")
    assert isinstance(refused.one, DiskFull)
    assert core.read_now("g") == machine.applied_index
    assert caught.outcomes == []
    machine.broken = None
    alone.run(1.0)
    assert caught.one.result == 2
    assert machine.commands == [b"first", b"second"]
    assert isinstance(applied(alone, b"third"), Applied)


def test_a_leader_whose_state_machine_has_no_room_hands_over(world: Any) -> None:
    made = world("abc", settings=SETTINGS)
    full = made.leader()
    made.machines[full, "g"].broken = DiskFull("no room")
    made.propose(full, b"first")
    made.run(1.0)
    successor = made.leader()
    assert successor != full
    assert isinstance(applied(made, b"second", successor), Applied)
    read = made.read(successor)
    made.run_until(lambda: read.outcomes)
    assert isinstance(read.one, int)
    assert made.cores[full].fatal is None


def test_a_journal_without_room_refuses_writes_serves_reads_and_goes_on(alone: Any) -> None:
    core = alone.cores["a"]
    alone.disks["a"].full = True
    caught = alone.propose("a", b"second" * 1000)
    alone.run(0.2)
    assert core.disk_full
    assert isinstance(alone.propose("a", b"third").one, DiskFull)
    assert core.read_now("g") is not None
    assert caught.outcomes == []
    alone.disks["a"].full = False
    alone.run(1.0)
    assert isinstance(caught.one, Applied)
    assert isinstance(applied(alone, b"third"), Applied)


def test_a_replay_without_room_serves_no_read_that_lacks_what_was_acknowledged(alone: Any) -> None:
    alone.kill("a")
    alone.restart("a")
    alone.machines["a", "g"].broken = DiskFull("no room")
    alone.run(0.5)
    assert alone.cores["a"].is_leader("g")
    assert alone.cores["a"].read_now("g") is None
    read = alone.read("a")
    alone.run(0.5)
    assert read.outcomes == []
    alone.machines["a", "g"].broken = None
    alone.run(1.0)
    assert read.one == alone.machines["a", "g"].applied_index
    assert alone.machines["a", "g"].commands == [b"first"]
