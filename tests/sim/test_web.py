"""Simulated HTTP does to the client core what a network and dying nodes do to a client."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import Call, Fate
from agentmem_chaos.sim.core_caller import POLICY, CoreCaller
from agentmem_chaos.sim.machine import Command
from agentmem_chaos.sim.planted import Worlds
from agentmem_chaos.sim.web import CLUSTER_PATH, body_of, command_of, url_of
from agentmem_chaos.sim.world import World
from agentmem_client.instructions import Failure, Send
from agentmem_client.topology import Topology

Outcome = tuple[int, Any] | Failure


@pytest.fixture
def world() -> Iterator[World]:
    """A world whose nodes have elected, without faults and without clients of its own."""
    world = World(Worlds({}, core_clients=True).plan(1))
    for node in world.nodes.values():
        node.boot_later(0.0)
    world.schedule.run_until(5.0)
    yield world
    world.close()


def ask(
    world: World, node: str, path: str, body: bytes | None = None, **headers: str
) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def answered(status: int, _: Mapping[str, str], data: bytes) -> None:
        outcomes.append((status, json.loads(data)))

    request = Send(1, "PATCH", url_of(node) + path, headers, body, 1.0, 1.0)
    world.web.send(request, random.Random(1), answered, lambda why, _: outcomes.append(why))
    return outcomes


def a_write(request: str = "c0-1") -> bytes:
    return body_of("meta", Command(request, Kind.WRITE.value, "k0", 7))


def leader_of(world: World) -> str:
    return next(
        name
        for name, node in world.nodes.items()
        if node.core is not None and node.core.is_leader("meta")
    )


def wait(world: World, seconds: float) -> None:
    world.schedule.run_until(world.schedule.now_s + seconds)


def test_any_node_shows_the_cluster_with_its_leaders(world: World) -> None:
    for name in world.nodes:
        outcomes = ask(world, name, CLUSTER_PATH)
        wait(world, 0.1)
        (outcome,) = outcomes
        assert isinstance(outcome, tuple)
        topology = Topology.read(outcome[1])
        assert set(topology.shards) == {spec.id for spec in world.plan.groups}
        assert topology.shards["meta"].leader == leader_of(world)
        owner = world.web.owner_of("meta", "k0")
        shard = topology.shard_of_owner(owner)
        assert shard is not None and shard.id == "meta"


def test_a_follower_names_the_leader(world: World) -> None:
    follower = next(name for name in world.nodes if name != leader_of(world))
    outcomes = ask(world, follower, "/sim/meta/k0", a_write(), **{"Idempotency-Key": "c0-1"})
    wait(world, 0.5)
    (outcome,) = outcomes
    assert isinstance(outcome, tuple)
    status, body = outcome
    assert (status, body["code"]) == (503, "not_leader")
    assert body["details"]["leader"] == leader_of(world)


def test_a_node_that_is_down_refuses(world: World) -> None:
    world.nodes["n1"].kill("killed")
    outcomes = ask(world, "n1", CLUSTER_PATH)
    wait(world, 0.5)
    assert outcomes == [Failure.REFUSED]


def test_a_killed_node_breaks_its_connections_and_one_without_power_says_nothing(
    world: World,
) -> None:
    for name in sorted(world.nodes)[:2]:
        world.nodes[name].pause()  # so that the request is there and not answered
    killed, silent = (ask(world, name, CLUSTER_PATH) for name in sorted(world.nodes)[:2])
    wait(world, 0.1)
    assert killed == silent == []
    world.nodes["n1"].kill("killed")
    world.nodes["n2"].lose_power("lost power")
    wait(world, 5.0)
    assert killed == [Failure.BROKEN]
    assert silent == []


def test_the_core_finds_the_leader_from_any_seed_and_its_write_is_there(world: World) -> None:
    spec = world.plan.groups[0]
    for number, seed in enumerate(sorted(world.nodes)):
        caller = CoreCaller(world.web, [seed], world.schedule, random.Random(number))
        fates: list[Fate] = []
        call = Call(0, "meta", "k0", Kind.WRITE, f"c0-{number}", world.schedule.now_s, value=number)
        caller.begin(call, spec, fates.append)
        wait(world, 1.0)
        assert fates == [Fate.ANSWERED]
        assert call.ok and call.index > 0
        assert world.nodes[leader_of(world)].machines["meta"].outcome(f"c0-{number}") is not None


def test_a_read_of_a_node_that_stands_still_is_answered_by_another_and_the_first_is_probed(
    world: World,
) -> None:
    caller = CoreCaller(world.web, list(world.nodes), world.schedule, random.Random(1))

    def read() -> float:
        """How long one takes, in virtual seconds."""
        ended: list[float] = []
        call = Call(0, "meta", "k0", Kind.READ, "", world.schedule.now_s)
        begun_s = world.schedule.now_s
        caller.begin(call, world.plan.groups[0], lambda _: ended.append(world.schedule.now_s))
        wait(world, POLICY.deadline_s)
        assert call.ok
        return ended[0] - begun_s

    read()  # so that the map is known, and whom it names is asked first
    leader = world.nodes[leader_of(world)]
    leader.pause()
    # An election later, and not only when the first attempt has had its time.
    assert read() < POLICY.deadline_s * POLICY.attempt_share_max / 2
    assert caller.router.is_ill(url_of(leader.name))
    leader.resume()
    for _ in range(2):  # a probe goes beside the first, and its answer is known by the second
        read()
    assert not caller.router.is_ill(url_of(leader.name))


def test_a_call_to_nobody_is_refused_in_time(world: World) -> None:
    for node in world.nodes.values():
        node.kill("killed")
    fates: list[Fate] = []
    call = Call(0, "meta", "k0", Kind.WRITE, "c0-1", world.schedule.now_s, value=1)
    caller = CoreCaller(world.web, list(world.nodes), world.schedule, random.Random(1))
    caller.begin(call, world.plan.groups[0], fates.append)
    wait(world, POLICY.deadline_s + 1.0)
    assert fates == [Fate.REFUSED]


def test_a_command_crosses_as_it_was() -> None:
    command = Command("c0-1", Kind.CAS.value, "m0.0", (2, 8), (1, 7), bytes(5))
    assert command_of(json.loads(body_of("s00", command)), "c0-1") == command
