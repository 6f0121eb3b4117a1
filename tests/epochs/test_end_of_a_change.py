"""Whoever ends a change says so, although its end is what takes the change from the view."""

from __future__ import annotations

from pathlib import Path

from agentmem_cluster.failpoints import arm
from tests.epochs.conftest import Cluster, run
from tests.epochs.test_moving_a_shard import move


class Passes:
    def __init__(self) -> None:
        self.count = 0

    def crash(self) -> None:  # type: ignore[override]
        raise AssertionError("nothing is armed to crash")

    def stall(self, seconds: float) -> None:
        self.count += 1


def test_the_conductor_tells_everybody_of_the_end_of_a_change(tmp_path: Path) -> None:
    passes = Passes()

    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], founders=4)
        await cluster.start("n1", "n2", "n3", "n4")
        try:
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            leader = cluster.meta_leader()
            assert leader is not None and leader._membership is not None
            view = leader._membership.view
            assert view is not None
            members = view.map.shards["s00"].members
            joiner = next(name for name in cluster.names if name not in members)
            change = move(cluster, "s00", [joiner, *members[1:]])
            assert await leader.changes.begin(change) == ""
            await cluster.until(
                lambda: not leader._membership.view.changes,  # type: ignore[union-attr]
                "the end of the change",
            )
            await cluster.until(lambda: passes.count == 1, "the conductor goes on after it")
        finally:
            await cluster.stop()

    arm("changes.after_finish=delay:0", passes)  # type: ignore[arg-type]
    try:
        run(scenario)
    finally:
        arm("", passes)  # type: ignore[arg-type]
