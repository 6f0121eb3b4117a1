"""The meta group's voters: an odd number, spread over zones, changed as little as can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import BadRequest
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import meta_voters


def nodes(count: int, *zones: str) -> list[NodeState]:
    return [NodeState(f"n{i + 1}", zones[i % len(zones)] if zones else "") for i in range(count)]


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[NodeState], list[str]]:
    states = []
    for i in range(1, draw(st.integers(1, 8)) + 1):
        kind = draw(st.sampled_from(["ok", "ok", "ok", "down", "lost", "draining"]))
        states.append(
            NodeState(
                f"n{i}",
                draw(st.sampled_from(["", "z1", "z2", "z3"])),
                is_draining=kind == "draining",
                is_lost=kind == "lost",
                is_up=kind in {"ok", "draining"},
            )
        )
    current = draw(st.lists(st.sampled_from([s.id for s in states]), unique=True, max_size=5))
    return states, current


def unevenness(voters: tuple[str, ...], states: list[NodeState]) -> int:
    zone_of = {s.id: s.zone for s in states}
    return sum(sum(zone_of[v] == z for v in voters) ** 2 for z in {*zone_of.values()})


@given(groups())
def test_no_choice_is_better_spread_and_none_so_well_spread_keeps_more(
    group: tuple[list[NodeState], list[str]],
) -> None:
    states, current = group
    able = [
        s.id for s in states if not s.is_lost and not s.is_draining and (s.is_up or s.id in current)
    ]
    if not able:
        with pytest.raises(BadRequest, match="No node can vote"):
            meta_voters(states, current)
        return
    voters = meta_voters(states, current)
    assert list(voters) == sorted(set(voters))
    if len(able) >= 3 or len(current) < 3:
        assert len(voters) == max(n for n in (1, 3, 5) if n <= len(able))
        assert set(voters) <= set(able)
        best = min(
            (unevenness(choice, states), len(set(choice) - set(current)))
            for choice in itertools.combinations(able, len(voters))
        )
        assert (unevenness(voters, states), len(set(voters) - set(current))) == best
    assert meta_voters(states, voters) == voters, "chosen voters stay"
    assert meta_voters(states[::-1], current[::-1]) == voters, "order does not matter"


@pytest.mark.parametrize(("count", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (9, 5)])
def test_one_three_or_five_vote(count: int, voters: int) -> None:
    assert len(meta_voters(nodes(count))) == voters


def test_voters_are_in_different_zones() -> None:
    states = nodes(9, "a", "a", "a", "b", "b", "b", "c", "c", "c")
    chosen = meta_voters(states, ("n1", "n2", "n3"))
    zones = sorted(s.zone for s in states if s.id in chosen)
    assert len(chosen) == 5
    assert max(zones.count(z) for z in "abc") == 2, "the loss of a zone leaves a majority"


def test_a_node_that_comes_or_restarts_changes_no_voter_in_vain() -> None:
    assert meta_voters(nodes(4), ("n2", "n3", "n4")) == ("n2", "n3", "n4")
    down = [*nodes(3)[:2], NodeState("n3", is_up=False), NodeState("n4")]
    assert meta_voters(down, ("n1", "n2", "n3")) == ("n1", "n2", "n3")


def test_a_lost_voter_is_replaced_when_another_node_can() -> None:
    lost = [*nodes(2), NodeState("n3", is_lost=True, is_up=False), NodeState("n4")]
    assert meta_voters(lost, ("n1", "n2", "n3")) == ("n1", "n2", "n4")


def test_three_voters_do_not_become_one_because_one_is_lost() -> None:
    lost = [*nodes(2), NodeState("n3", is_lost=True, is_up=False)]
    assert meta_voters(lost, ("n1", "n2", "n3")) == ("n1", "n2", "n3")


def test_a_lost_voter_never_votes_alone() -> None:
    states = [NodeState("n1"), NodeState("n2", is_lost=True, is_up=False)]
    gone = [NodeState(n, is_draining=True) for n in ("n3", "n4")]
    assert meta_voters([*states, *gone], ("n2", "n3", "n4")) == ("n1",)


def test_of_three_nodes_that_are_drained_to_two_one_votes() -> None:
    draining = [*nodes(2), NodeState("n3", is_draining=True)]
    assert meta_voters(draining, ("n1", "n2", "n3")) == ("n1",)


def test_of_five_voters_the_one_that_is_down_goes_first() -> None:
    states = [NodeState("n1", is_up=False), *nodes(5)[1:4]]
    lost = NodeState("n5", is_lost=True, is_up=False)
    assert meta_voters([*states, lost], ("n1", "n2", "n3", "n4", "n5")) == ("n2", "n3", "n4")


def test_no_node_that_is_down_becomes_a_voter() -> None:
    states = [*nodes(3), NodeState("n4", is_up=False), NodeState("n5", is_up=False)]
    assert meta_voters(states, ("n1",)) == ("n1", "n2", "n3")
