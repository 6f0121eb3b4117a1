"""A cluster is founded by any majority of its founders, in whatever order they come."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.epochs.conftest import Cluster, run


@pytest.mark.parametrize("turn", range(2))  # who is first is a race
@pytest.mark.parametrize(("founders", "up"), [(2, 2), (3, 2), (5, 3)])
def test_a_founder_that_was_first_keeps_no_other_from_founding(
    tmp_path: Path, founders: int, up: int, turn: int
) -> None:
    async def scenario() -> None:
        names = [f"n{number + 1}" for number in range(founders)]
        cluster = Cluster(tmp_path, names, founders=founders, shards=2)
        try:
            await cluster.start(*names[:up])
            if founders <= 3:  # of more, some shard may be on those that are not there yet
                memory_id = await cluster.add("ada", "the first memory")
                assert b"the first" in bytes((await cluster.read(memory_id)).memory)
        finally:
            await cluster.stop()

    run(scenario, 40)
