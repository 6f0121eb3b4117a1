"""A node whose disk is new ends while it is admitted, or while it takes its replicas back."""

from __future__ import annotations

import shutil

import pytest

from tests.failpoints.cluster import IS_LONG, FaultyCluster, Load, until

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not IS_LONG, reason="`make failpoints` runs it"),
]

POINTS = (
    "admission.before_record",
    "admission.after_record",
    "record.after_write",
    "record.after_rename",
    "copying.after_chunk",
    "copying.after_rename",
    "replicas.before_record",
    "replicas.after_record",
    "replicas.after_add_group",
)


@pytest.mark.parametrize("point", POINTS)
def test_a_node_that_ends_while_it_comes_back_with_a_new_disk_comes_back_all_the_same(
    cluster: FaultyCluster, point: str
) -> None:
    shard = f"s0{POINTS.index(point) % 2}"
    leader = until(lambda: cluster.leader_of(shard), 15.0, f"a leader of {shard}")
    epoch, members = cluster.command(leader, "look")["map"][shard]
    victim = next(name for name in members if name != leader)
    with Load(cluster.urls, f"disk-{point}") as load:
        cluster.kill(victim)
        shutil.rmtree(cluster.node(victim).directory / "data")
        load.more(10)
        plan = {"AGENTMEM_CHAOS_FAILPOINTS": f"{point}=crash"}
        cluster.restart(victim, wait_s=0, environment=plan)
        cluster.ends_at(victim, point)
        cluster.restart(victim)
        load.more(10)

    def is_back() -> bool:
        view = cluster.command(victim, "look")
        now, holders = view["map"][shard]
        return now > epoch and (victim not in holders or view["here"].get(shard) == now)

    until(is_back, 20.0, f"{shard} in an epoch that the new disk may take part in")
    cluster.soundly()
    load.nothing_is_lost(cluster.urls)
