"""A group that was just founded has a leader at once; any other takes its time, as it must."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from agentmem_cluster.raft.api import GroupSpec, Role
from agentmem_cluster.raft.frames import Kind


def said(world: Any, sender: str) -> set[int]:
    """The kinds of frames on their way from a node."""
    queues = [queue for pair, queue in world.queues.items() if pair[0] == sender]
    return {frame[0] for queue in queues for burst in queue for frame in msgpack.unpackb(burst)}


def test_a_group_of_one_is_led_after_its_first_tick(world: Any) -> None:
    made = world("a")
    made.cores["a"].tick()
    assert made.cores["a"].status("g").role is Role.LEADER


@pytest.mark.parametrize("preferred", ["a", "b", "c"])
def test_the_preferred_member_leads_a_fresh_group_without_waiting(
    world: Any, preferred: str
) -> None:
    made = world("abc", preferred=preferred)
    made.settle()  # no time passes
    assert made.leaders() == [preferred]
    assert made.cores[preferred].status("g").term == 1


def test_without_a_preference_a_fresh_group_waits_an_election_timeout(world: Any) -> None:
    made = world("abc")
    made.run(made.settings.election_s_min - 0.02)
    assert made.leaders() == []


def test_the_preferred_member_asks_again_soon_when_the_others_do_not_serve_the_group_yet(
    world: Any,
) -> None:
    made = world("abc", preferred="b")
    for name in "ac":
        made.cores[name].remove_group("g")
    made.settle()
    assert made.leaders() == []
    spec = GroupSpec("g", 1, ("a", "b", "c"), preferred="b")
    made.cores["a"].add_group(spec, made.machines["a", "g"])
    made.run(made.settings.heartbeat_s + 0.02)
    assert made.leaders() == ["b"]


def test_the_preferred_member_asks_at_once_when_a_peer_connects(world: Any) -> None:
    made = world("abc", preferred="b")
    for name in "ac":
        made.kill(name)
    made.settle()
    made.restart("a")
    made.settle()
    assert made.leaders() == ["b"]


def test_answers_slower_than_the_asking_still_make_a_leader(world: Any) -> None:
    made = world("abc", preferred="b")
    made.cut = {(x, y) for x in "abc" for y in "abc"}  # frames are delivered below, late
    late: list[tuple[float, str, str, Any]] = []
    until_s = made.clock.now_s + 1.5
    while made.clock.now_s < until_s:
        for name in "abc":
            made.tick(name)
        for (sender, receiver), queue in made.queues.items():
            late += [(made.clock.now_s + 0.15, sender, receiver, burst) for burst in queue]
            queue.clear()
        for at_s, sender, receiver, burst in list(late):
            if at_s <= made.clock.now_s:
                late.remove((at_s, sender, receiver, burst))
                made.cores[receiver].receive(sender, msgpack.unpackb(burst))
        made.clock.now_s += 0.01
    assert made.leaders() == ["b"]
    assert made.cores["b"].status("g").term == 1


def test_a_fresh_group_whose_preferred_member_is_away_elects_another(world: Any) -> None:
    made = world("abc", preferred="b")
    made.kill("b")
    made.run(2 * made.settings.election_s_max + 1.0)
    assert len(made.leaders()) == 1


def test_the_preference_says_nothing_about_a_group_that_is_not_fresh(world: Any) -> None:
    made = world("abc", preferred="b")
    made.settle()
    for name in "abc":
        made.kill(name)
    for name in "abc":
        made.restart(name)
    made.settle()
    assert made.leaders() == []
    assert said(made, "b") <= {Kind.APPENDED}
