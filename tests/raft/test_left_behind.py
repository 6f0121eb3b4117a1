"""A member that no log can help any more says so: otherwise nobody would re-seed it."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem_cluster.errors import AgentMemError, StateDamaged, Unavailable
from agentmem_cluster.raft.applying import MARK_BYTES
from agentmem_cluster.raft.settings import RaftSettings

SETTINGS = RaftSettings(tail_bytes=1, tail_bytes_max=1, checkpoint_entries=1)


@pytest.mark.parametrize("own_entries", [0, 60], ids=["its log ends before", "its log conflicts"])
def test_a_member_whose_part_of_the_log_is_compacted_needs_a_re_seed(
    world: Any, own_entries: int
) -> None:
    """The second case: a leader that was cut off has entries which nobody else ever had, and the
    index where the others' logs begin is one of those."""
    made = world("abc", settings=SETTINGS, preferred="a")
    made.settle()
    made.isolate("a")
    for number in range(own_entries):
        made.propose("a", b"lost %d" % number)
    made.settle()
    made.kill("a")
    made.cut.clear()
    leader = made.leader()
    for number in range(20):
        made.propose(leader, (b"kept %d" % number).ljust(MARK_BYTES))
        made.settle()
    made.run(0.5)
    status = made.cores[leader].status("g")
    assert status.first_index > 10, status
    made.restart("a")
    made.run(3.0)
    own = made.cores["a"].status("g")
    assert own.applied_index < status.applied_index
    assert (own.last_index + 1 < status.first_index) == (own_entries == 0)
    assert made.cores["a"].needs_reseed("g")
    assert not any(made.cores[name].needs_reseed("g") for name in "bc")
    assert isinstance(made.read("a").one, Unavailable), "whoever asks it would wait in vain"


def test_a_deposed_leader_that_can_be_helped_needs_none(world: Any) -> None:
    made = world("abc", preferred="a")
    made.settle()
    made.isolate("a")
    for number in range(60):
        made.propose("a", b"lost %d" % number)
    made.settle()
    made.kill("a")
    made.cut.clear()
    leader = made.leader()
    for number in range(20):
        made.propose(leader, b"kept %d" % number)
    made.restart("a")
    made.run(3.0)
    assert not made.cores["a"].needs_reseed("g")
    assert made.machines["a", "g"].commands == made.machines[leader, "g"].commands


def test_a_leader_whose_state_is_damaged_resigns_until_a_whole_one_leads(world: Any) -> None:
    """Two of three cannot apply an entry: they vote and keep it, and the third one leads."""
    made = world("abc", preferred="a")
    made.settle()
    damaged = StateDamaged("a row is not what was written")
    for name in "ab":
        made.machines[name, "g"].broken = damaged
    told = made.propose("a", b"what builds on it")
    made.run_until(lambda: made.leaders() == ["c"], 30.0)
    assert told.outcomes == [] or isinstance(told.one, AgentMemError)
    assert made.cores["a"].needs_reseed("g") and made.cores["b"].needs_reseed("g")
    done = made.propose("c", b"and more")
    made.run_until(lambda: done.outcomes)
    assert not isinstance(done.one, AgentMemError), "both damaged members keep what c sends"
    assert made.machines["c", "g"].commands == [b"what builds on it", b"and more"]
    assert made.machines["a", "g"].commands == []
