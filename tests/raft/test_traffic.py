"""What a commit costs in frames and in turns of pysyncobj: no more than it needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgpack
import pytest

from agentmem_cluster.raft.frames import Kind


class Counted:
    """A world whose frames are counted by kind on their way."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.kinds: Counter[Kind] = Counter()
        for name, core in world.cores.items():
            self._count(core, name)

    def _count(self, core: Any, name: str) -> None:
        take = core.take_outbox

        def counting() -> Any:
            taken = take()
            for _, frames in taken:
                self.kinds.update(Kind(frame[0]) for frame in frames)
            return taken

        core.take_outbox = counting


def test_a_commit_costs_a_follower_one_append_one_answer_and_one_notice(world: Any) -> None:
    made = world("abc")
    leader = made.leader()
    made.run(0.3)
    made.run_until(lambda: made.clock.now_s * 10 % 1 > 0.2)  # between two beats
    counted = Counted(made)
    told = made.propose(leader, b"only")
    made.run(made.settings.heartbeat_s / 4)
    assert told.one.index == made.cores[leader].status("g").commit_index
    assert all(m.applied_index == told.one.index for m in made.machines.values())
    assert counted.kinds == {Kind.APPEND: 4, Kind.APPENDED: 2}


def test_what_several_groups_committed_is_told_at_the_same_moment(world: Any) -> None:
    groups = tuple(f"g{n}" for n in range(8))
    made = world("abc", groups=groups, preferred="a")
    made.run_until(lambda: all(made.leaders(g) == ["a"] for g in groups))
    made.run(0.3)
    core = made.cores["a"]
    wakeups: set[float] = set()
    for step, group in enumerate(groups):
        made.propose("a", b"%d" % step, group)
        made.settle()
        made.clock.now_s += 0.0001
        wakeups.add(core.next_wakeup())
    assert len(wakeups) <= 2


def test_a_follower_answers_every_beat_of_an_idle_group(world: Any) -> None:
    made = world("abc")
    made.leader()
    made.run(0.3)
    counted = Counted(made)
    made.run(1.0)
    beats = counted.kinds[Kind.APPEND]
    assert beats in range(18, 24)
    assert counted.kinds[Kind.APPENDED] == beats


@pytest.mark.parametrize("lost", ["answers", "appends"])
def test_frames_that_a_full_buffer_dropped_are_made_good(world: Any, lost: str) -> None:
    made = world("abc")
    leader = made.leader()
    made.run(0.3)
    told = made.propose(leader, b"only")
    made.tick(leader)
    for (sender, receiver), queue in made.queues.items():
        if lost == "appends" and sender == leader:
            queue.clear()
        elif lost == "answers" and sender == leader:
            made.deliver(sender, receiver)
            made.tick(receiver)
            made.queues[receiver, sender].clear()
    made.run_until(lambda: told.outcomes, seconds=0.5)
    more = made.propose(leader, b"more")
    made.run_until(lambda: more.outcomes, seconds=0.5)
    assert made.leaders() == [leader]


def test_an_answer_that_moves_nothing_takes_no_turn_of_pysyncobj(world: Any) -> None:
    made = world("abc")
    leader = made.leader()
    made.run(0.3)
    group = made.cores[leader]._groups["g"]
    turns = 0
    tick = group.member.tick

    def counting() -> None:
        nonlocal turns
        turns += 1
        tick()

    group.member.tick = counting
    for _ in range(50):
        frame = [int(Kind.APPENDED), "g", 1, b"other!!!", group.member.term]
        frame += [group._voice.boot, group.log.last_index]
        made.cores[leader].receive(
            "abc".replace(leader, "")[0], msgpack.unpackb(msgpack.packb([frame]))
        )
        made.tick(leader)
    assert turns <= 1
