"""Linearizable reads: on any replica, never stale, and never waiting for ever."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from agentmem_cluster.errors import NoQuorum
from agentmem_cluster.raft.settings import RaftSettings


def follower_of(world: Any, leader: str) -> str:
    found: str = next(name for name in world.names if name != leader)
    return found


def write(world: Any, leader: str, command: bytes) -> int:
    told = world.propose(leader, command)
    world.run_until(lambda: told.outcomes)
    index: int = told.one.index
    return index


def test_a_read_on_any_replica_sees_what_was_acknowledged_before_it(world: Any) -> None:
    made = world("abc")
    leader = made.leader()
    for number in range(5):
        index = write(made, leader, b"%d" % number)
        for name in made.names:
            read = made.read(name)
            made.run_until(lambda told=read: told.outcomes)
            assert read.one >= index
            assert made.machines[name, "g"].applied_index >= index


def test_a_follower_read_ends_though_answers_are_slower_than_its_asking_again(world: Any) -> None:
    made = world("abc", settings=RaftSettings(election_s_min=2.0, election_s_max=3.0))
    leader = made.leader()
    reader = follower_of(made, leader)
    read = made.read(reader)
    late: list[tuple[float, str, str, Any]] = []
    until_s = made.clock.now_s + 1.0
    way_s = 0.15  # 0.3 s there and back; asked again every 0.2 s
    while made.clock.now_s < until_s and not read.outcomes:
        for name in made.names:
            made.tick(name)
        for (sender, receiver), queue in made.queues.items():
            if {sender, receiver} == {leader, reader}:
                late += [(made.clock.now_s + way_s, sender, receiver, burst) for burst in queue]
                queue.clear()
            else:
                made.deliver(sender, receiver)
        for at_s, sender, receiver, burst in [item for item in late if item[0] <= made.clock.now_s]:
            late.remove((at_s, sender, receiver, burst))
            made.cores[receiver].receive(sender, msgpack.unpackb(burst))
        made.clock.now_s += 0.01
    assert isinstance(read.one, int)


def test_a_read_round_whose_questions_were_lost_is_asked_again(world: Any) -> None:
    made = world("abc")
    leader = made.leader()
    made.cores[leader].tick()
    read = made.read(leader)
    made.tick(leader)
    for queue in made.queues.values():
        queue.clear()
    made.run_until(lambda: read.outcomes, seconds=0.5)
    assert isinstance(read.one, int)


@pytest.mark.parametrize("where", ["leader", "follower"])
def test_without_a_quorum_a_read_is_refused_within_an_election_timeout(
    world: Any, where: str
) -> None:
    made = world("abc")
    leader = made.leader()
    name = leader if where == "leader" else follower_of(made, leader)
    made.isolate(name)
    read = made.read(name)
    made.run_until(lambda: read.outcomes, seconds=made.settings.election_s_max + 0.1)
    assert isinstance(read.one, NoQuorum)


def test_reads_of_an_index_that_never_comes_are_forgotten_with_their_callers(world: Any) -> None:
    made = world("a", settings=RaftSettings(queue_reads_max=100))
    made.leader()
    core = made.cores["a"]
    for _ in range(100):
        core.when_applied("g", 1_000_000, lambda outcome: None, made.clock.now_s + 0.5)
    full = made.read("a")
    assert not isinstance(full.one, int)
    made.run(2.0)
    read = made.read("a")
    made.run_until(lambda: read.outcomes, seconds=0.1)
    assert isinstance(read.one, int)


def test_an_idle_group_makes_no_checkpoints(world: Any) -> None:
    made = world("a", settings=RaftSettings(checkpoint_s=0.5))
    made.leader()
    write(made, "a", b"only")
    made.run(2.0)
    machine = made.machines["a", "g"]
    count = machine.checkpoints
    assert machine.durable_index == machine.applied_index
    made.run(5.0)
    assert machine.checkpoints == count
