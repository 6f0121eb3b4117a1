"""A member that no log can help any more says so: otherwise nobody would re-seed it."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem_cluster.errors import Unavailable
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
