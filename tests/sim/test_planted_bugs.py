"""The harness is worth what it catches: bugs are planted, and each must be caught by its rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agentmem_chaos.sim.parts import Parts
from agentmem_chaos.sim.planted import CUTS, PLANTS, Plant, Worlds, find
from agentmem_cluster.raft.core import NodeCore


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.protection}: {plant.bug}")
def test_what_a_protection_prevents_is_caught_without_it(plant: Plant) -> None:
    found = find(plant)
    assert found.rules & plant.rules, found


DISTINCT_WORLDS = [
    plant.worlds
    for at, plant in enumerate(PLANTS)
    if plant.worlds not in [before.worlds for before in PLANTS[:at]]
]


@pytest.mark.parametrize("worlds", DISTINCT_WORLDS)
def test_without_a_planted_bug_these_worlds_are_clean(worlds: Worlds) -> None:
    plant = Plant("none", "nothing", frozenset(), worlds, worlds_max=2)
    assert not find(plant).is_found, find(plant)


def test_a_plant_is_gone_when_its_worlds_have_been_played() -> None:
    plants = [plant for plant in PLANTS if plant.worlds == PLANTS[1].worlds]
    for plant in plants:
        find(dataclasses.replace(plant, worlds_max=1))
    assert not find(Plant("none", "nothing", frozenset(), PLANTS[1].worlds, worlds_max=1)).is_found


class Raises(NodeCore):
    def read_index(self, group_id: str, done: Any, until_s: float = 0.0) -> None:
        raise ZeroDivisionError


class Stops(NodeCore):
    def read_index(self, group_id: str, done: Any, until_s: float = 0.0) -> None:
        self.fatal = ZeroDivisionError()


class NeverReads(NodeCore):
    def read_index(self, group_id: str, done: Any, until_s: float = 0.0) -> None:
        pass


@pytest.mark.parametrize(
    ("core", "rule"),
    [(Raises, "no exceptions"), (Stops, "no stop without cause"), (NeverReads, "liveness")],
)
def test_a_core_that_raises_or_stops_or_hangs_is_caught(core: type[NodeCore], rule: str) -> None:
    plant = Plant("none", "a core", frozenset([rule]), Worlds(CUTS), Parts(make_core=core))
    assert find(plant).rules == {rule}
