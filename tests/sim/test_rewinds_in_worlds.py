"""Shards that are taken back while they move, split, crash and lose disks: no read shows anything
but what was there, and what was kept, in this order."""

from __future__ import annotations

import dataclasses

import pytest

from agentmem_chaos.checker import Kind, Operation, Verdict, check
from agentmem_chaos.sim.plan import Engine, Fault
from agentmem_chaos.sim.planted import REWINDING
from agentmem_chaos.sim.rewinds import AtVersion
from agentmem_chaos.sim.world import World

FAULTS = {**REWINDING.faults, Fault.SPLIT: 8.0, Fault.LOSE_DISK: 10.0, Fault.POWER_LOSS: 8.0}


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("seed", [1, 2, 4, 5])
def test_what_a_rewind_undid_is_not_seen_again(seed: int, engine: Engine) -> None:
    worlds = dataclasses.replace(REWINDING, engine=engine, faults=FAULTS)
    result = World(worlds.plan(seed)).run()
    assert result.violations == []
    assert result.rewinds > 0


def test_a_rewind_explains_an_older_value_and_nothing_else() -> None:
    def read(at_s: float, value: int) -> Operation:
        return Operation(1, "k", at_s, at_s + 0.1, Kind.READ, result=value)

    history = [
        Operation(1, "k", 0.0, 0.1, Kind.WRITE, 1, result=1),
        Operation(1, "k", 1.0, 1.1, Kind.WRITE, 2, result=2),
        Operation(-1, "k", 2.0, 2.5, Kind.WRITE, 1),
    ]
    assert check([*history, read(3.0, 1)]).verdict is Verdict.LINEARIZABLE
    assert check([*history, read(3.0, 2)]).verdict is Verdict.VIOLATION
    assert check([*history, read(1.5, 1)]).verdict is Verdict.VIOLATION


def test_a_version_equals_every_content_of_it() -> None:
    assert AtVersion(3) == (3, 17) and AtVersion(3) == (3, 18)
    assert AtVersion(3) != (4, 17) and AtVersion(3) != None  # noqa: E711
