"""The command line: what it prints, and what its exit code means."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from agentmem_chaos import cli
from agentmem_chaos.sim.result import WorldResult
from agentmem_chaos.sim.runner import Order, Outcome, rotating_seed, seeds
from agentmem_chaos.sim.story import Line


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["sim", *arguments])
    return result.exit_code, result.output


def test_a_world_is_told_line_by_line() -> None:
    code, output = run("--seed", "7", "--seconds", "20", "--story")
    assert code == 0
    for part in ("started (boot 1)", "is leader of meta", "everything is healed", "0 worlds"):
        assert part in output


def test_json_is_one_object_per_world_on_stdout() -> None:
    result = CliRunner().invoke(
        cli.main,
        ["sim", "--seed", "7", "--worlds", "2", "--seconds", "15", "--jobs", "1", "--json"],
    )
    worlds = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(world["seed"] for world in worlds) == [7, 8]
    assert all(world["passed"] and world["trace_hash"] for world in worlds)


def test_a_violation_exits_with_1_and_says_how_to_play_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def violated(order: Order) -> Outcome:
        lines = [Line(1.5, "n1", "killed"), Line(2.0, "", "VIOLATION of liveness: planted")]
        result = WorldResult(order.seed, ["liveness at 2.0 s: planted"], nodes=3, lines=lines)
        return Outcome(order, result, 0.1)

    monkeypatch.setattr(cli, "play", violated)
    code, output = run("--seed", "12", "--nodes", "5", "--seconds", "30")
    assert code == cli.EXIT_VIOLATION == 1
    assert "liveness at 2.0 s: planted" in output
    assert "agentmem-chaos sim --seed 12 --nodes 5 --seconds 30 --story" in output
    assert "n1        killed" in output, "the end of the story comes with it"


def test_a_world_that_fails_by_itself_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("agentmem_chaos.sim.plan.WorldPlan.draw", fails)
    code, output = run("--seed", "12")
    assert code == 1
    assert "the world itself failed" in output and "ZeroDivisionError" in output


def test_a_story_is_of_one_world() -> None:
    code, output = run("--worlds", "3", "--story")
    assert code == 2
    assert "--seed" in output


def test_a_run_has_fixed_seeds_and_new_ones() -> None:
    first, second = rotating_seed(), rotating_seed()
    assert first != second
    chosen = seeds(300, first)
    assert len(chosen) == len(set(chosen)) == 300
    assert chosen[:250] == list(range(1, 251))
    assert chosen[250:] == list(range(first, first + 50))
