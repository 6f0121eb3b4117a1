"""A world is a function of its seed: the same bytes in every process, whatever Python hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from agentmem_chaos.sim.runner import Order, play


def trace_of(seed: int, hash_seed: str) -> str:
    command = ["-m", "agentmem_chaos.cli", "sim", "--seed", str(seed), "--seconds", "40", "--json"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return str(json.loads(done.stdout)["trace_hash"])


# Of registers and of real shards, with plain clients and with the client library's core; the last
# two of shards that move.
@pytest.mark.parametrize("seed", [3, 6, 10, 5, 14])
def test_the_same_seed_gives_the_same_bytes_in_two_processes_that_hash_differently(
    seed: int,
) -> None:
    assert trace_of(seed, "1") == trace_of(seed, "2")


def test_a_world_does_not_depend_on_the_worlds_before_it() -> None:
    alone = play(Order(5, seconds=20.0)).result
    play(Order(6, seconds=20.0))
    again = play(Order(5, seconds=20.0)).result
    assert again == alone


def test_a_world_on_real_files_does_not_depend_on_where_they_are() -> None:
    first = play(Order(6, seconds=20.0, story=True)).result
    second = play(Order(6, seconds=20.0, story=True)).result
    assert first.engine == "shard"
    assert [str(line) for line in first.lines] == [str(line) for line in second.lines]
    assert first == second


def test_another_seed_gives_another_world() -> None:
    assert (
        play(Order(5, seconds=20.0)).result.trace_hash
        != play(Order(6, seconds=20.0)).result.trace_hash
    )


def test_keeping_the_story_does_not_change_it() -> None:
    silent = play(Order(5, seconds=20.0)).result
    told = play(Order(5, seconds=20.0, story=True)).result
    assert told.trace_hash == silent.trace_hash
    assert told.lines and not silent.lines
