"""A member ends while its copies become the parts of a split: the split is completed, or the shard
goes on whole, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.failpoints.cluster import IS_LONG, FaultyCluster, Load
from tests.failpoints.test_move_path_process import begin, over

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

SHARD = "s00"
POINTS = ("copying.while_trimming", "copying.after_restrict")


@pytest.mark.parametrize("point", POINTS if IS_LONG else POINTS[:1])
def test_a_crash_while_a_shard_is_split_leaves_the_whole_or_both_parts(
    cluster: FaultyCluster, point: str
) -> None:
    views = cluster.views()
    members = next(iter(views.values()))["map"][SHARD][1]
    victim = next(name for name in members if SHARD not in views[name]["leads"])
    with Load(cluster.urls, point) as load:
        load.more(20)
        cluster.command(victim, "arm", plan=f"{point}=crash")
        operation = begin(cluster, {"kind": "split", "shard": SHARD}, [victim])
        cluster.any_ends_at(point)
        cluster.restart(victim)
        state = over(cluster, operation)
        load.more(10)
    cluster.soundly()
    view: dict[str, Any] = cluster.command(cluster.names[0], "look")
    assert len(view["map"]) == len(views[victim]["map"]) + (state == "done")
    load.nothing_is_lost(cluster.urls)
