"""A node ends at each point on the way of a write: nothing acknowledged is lost, replicas agree."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.failpoints.cluster import IS_LONG, FaultyCluster, Load, ended, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

# The journal's other points are passed by a process of its own (test_journal_process).
SHORT = (
    "journal.after_write",
    "checkpoint.after_rename",
    "gate.after_release",
    "write.after_apply",
)
LONG = (
    "journal.after_sync",
    "apply.after_commit",
    "checkpoint.after_datasync",
    "journal.before_roll",
    "journal.before_write",
    "journal.before_sync",
    "journal.before_dir_sync",
    "journal.after_dir_sync",
    "journal.before_mark",
    "journal.after_mark",
    "journal.after_allocate",
    "outbox.before_send",
    "apply.before_batch",
    "apply.after_batch",
    "apply.before_commit",
    "checkpoint.before_datasync",
    "checkpoint.before_rename",
    "checkpoint.after_dir_sync",
    "link.before_send",
    "write.before_propose",
)
POINTS = (*SHORT, *LONG) if IS_LONG else SHORT
PAIRS = [POINTS[at : at + 2] for at in range(0, len(POINTS), 2)]


@pytest.mark.parametrize("points", PAIRS, ids="+".join)
def test_crashes_on_the_way_of_a_write_lose_nothing(
    cluster: FaultyCluster, points: tuple[str, ...]
) -> None:
    """The leader of a shard ends at the first point, its successor at the second."""
    shard = f"s0{PAIRS.index(points) % 2}"
    with Load(cluster.urls, points[0]) as load:
        victims = []
        for point in points:
            victims.append(until(lambda: cluster.leader_of(shard), 15.0, f"a leader of {shard}"))
            with suppress(ConnectionResetError):  # it may be there before it has answered
                cluster.command(victims[-1], "arm", plan=f"{point}=crash")
            cluster.ends_at(victims[-1], point)
        for name in victims:
            cluster.restart(name, wait_s=0)
        cluster.wait_ready()
        load.more(10)
    cluster.soundly()
    load.nothing_is_lost(cluster.urls)


ALL_AT_ONCE = tuple(p for p in (*SHORT, *LONG) if IS_LONG or p == "journal.before_write")


@pytest.mark.parametrize("point", ALL_AT_ONCE)
def test_all_nodes_that_end_at_once_have_what_was_acknowledged(
    cluster: FaultyCluster, point: str
) -> None:
    """No other replica is left to learn it from: every promise was on a disk."""
    with Load(cluster.urls, f"all-{point}") as load:
        for name in cluster.names:
            # Not at the first pass, so that all are armed when the first of them ends.
            cluster.command(name, "arm", plan=f"{point}=crash@5")
        cluster.any_ends_at(point)
        for name in cluster.names:
            if not cluster.crashed(name, point):
                cluster.kill(name)
        for name in cluster.names:
            cluster.restart(name, wait_s=0)
        cluster.wait_ready()
        load.more(10)
    cluster.soundly()
    load.nothing_is_lost(cluster.urls)


RECOVERY = ("journal.recovered", "link.after_accept")


def test_a_crash_in_recovery_is_recovered_from(cluster: FaultyCluster) -> None:
    victim = cluster.names[0]
    with Load(cluster.urls, "recovery") as load:
        cluster.kill(victim)
        load.more(10)
        for point in RECOVERY if IS_LONG else RECOVERY[:1]:
            plan = {"AGENTMEM_CHAOS_FAILPOINTS": f"{point}=crash"}
            cluster.restart(victim, wait_s=0, environment=plan)
            cluster.ends_at(victim, point)
        cluster.restart(victim)
        load.more(10)
    cluster.soundly()
    load.nothing_is_lost(cluster.urls)


FOUNDING = (
    "shard.before_rename",
    "shard.after_rename",
    "record.before_write",
    "record.after_write",
    "record.after_rename",
    "meta.before_rename",
    "meta.after_rename",
    "view.before_write",
    "view.after_write",
    "view.after_rename",
)


@pytest.mark.skipif(not IS_LONG, reason="`make failpoints` runs it")
@pytest.mark.parametrize("point", FOUNDING)
def test_a_cluster_whose_founders_all_end_while_they_found_it_is_founded_all_the_same(
    tmp_path_factory: pytest.TempPathFactory, point: str
) -> None:
    plan = {"AGENTMEM_CHAOS_FAILPOINTS": f"{point}=crash"}
    folder = tmp_path_factory.mktemp("f")
    with ended(FaultyCluster(folder, 3, {"cluster.shards": 3}, environment=plan)) as cluster:
        cluster.start()
        first = cluster.any_ends_at(point)
        for name in cluster.names:
            if name != first and cluster.is_running(name):
                cluster.kill(name)
        for name in cluster.names:
            cluster.restart(name, wait_s=0, environment={"AGENTMEM_CHAOS_FAILPOINTS": ""})
        cluster.wait_ready(30)
        with Load(cluster.urls, point) as load:
            load.more(20)
        cluster.soundly()
        load.nothing_is_lost(cluster.urls)


BROKEN = ("journal.before_sync", "journal.before_write", "checkpoint.before_datasync")


@pytest.mark.skipif(not IS_LONG, reason="`make failpoints` runs it")
@pytest.mark.parametrize("point", BROKEN)
def test_a_node_whose_disk_fails_stops_by_itself_and_nothing_is_lost(
    cluster: FaultyCluster, point: str
) -> None:
    shard = f"s0{BROKEN.index(point) % 2}"
    with Load(cluster.urls, f"broken-{point}") as load:
        victim = until(lambda: cluster.leader_of(shard), 15.0, f"a leader of {shard}")
        cluster.command(victim, "arm", plan=f"{point}=error:EIO@1")
        cluster.met(victim, point)
        until(lambda: not cluster.is_running(victim), 15.0, f"{victim} stops")
        (crash,) = cluster.crashes()
        assert (crash.node, crash.exit_code) == (victim, 1)
        load.more(10)
        cluster.restart(victim)
        load.more(10)
    cluster.soundly()
    load.nothing_is_lost(cluster.urls)
