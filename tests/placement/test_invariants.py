"""The cluster's checks: silent on a healthy cluster, and each fault is found by the one meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given

from agentmem_cluster.invariants import Finding, ReplicaReport, Reports, check_cluster
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import meta_voters, plan_rebalance
from agentmem_cluster.shardmap import ShardMap
from tests.placement.worlds import World, applied, make_map, placed_map, troubled_worlds, worlds

NODES = {n: NodeState(n, zone) for n, zone in (("n1", "a"), ("n2", "b"), ("n3", "c"), ("n4", "c"))}
MAP = placed_map(NODES, 4, 3)
VOTERS = ("n1", "n2", "n3")
NAMES = [
    "slots",
    "replication",
    "answers",
    "quorum",
    "epochs",
    "leaders",
    "digests",
    "freshness",
    "leftovers",
    "zones",
    "load",
    "meta group",
]


def healthy(shard_map: ShardMap, nodes: Sequence[str]) -> dict[str, list[ReplicaReport]]:
    return {
        node: [
            ReplicaReport(
                info.id, info.epoch, 7, b"same", info.preferred_leader == node, 2, 0, False
            )
            for info in shard_map.shards_of_node(node)
        ]
        for node in nodes
    }


def failing(findings: Sequence[Finding]) -> dict[str, str]:
    assert [finding.name for finding in findings] == NAMES, "every check, always in this order"
    assert all(f.message.endswith(".") and "\n" not in f.message for f in findings)
    return {finding.name: finding.message for finding in findings if not finding.ok}


def check(
    reports: Reports,
    *,
    shard_map: ShardMap = MAP,
    nodes: dict[str, NodeState] = NODES,
    replication: int = 3,
    voters: Sequence[str] = VOTERS,
) -> dict[str, str]:
    return failing(check_cluster(shard_map, nodes, reports, replication, voters))


@given(worlds())
def test_nothing_is_found_in_a_cluster_placed_by_the_ring(world: World) -> None:
    copies = min(world.replication, len(world.nodes))
    findings = check_cluster(
        world.map,
        world.nodes,
        healthy(world.map, list(world.nodes)),
        copies,
        meta_voters(world.nodes),
    )
    assert failing(findings) == {}


@given(troubled_worlds())
def test_a_rebalanced_cluster_whose_nodes_are_up_passes_the_checks_of_placement(
    world: World,
) -> None:
    nodes = {n: NodeState(n, state.zone) for n, state in world.nodes.items()}
    steps = plan_rebalance(world.map, nodes, world.replication)
    after = applied(world.map, steps)
    copies = min(world.replication, len(nodes))
    findings = check_cluster(after, nodes, healthy(after, list(nodes)), copies, meta_voters(nodes))
    assert failing(findings) == {}


def changed(
    shard: str, which: Callable[[ReplicaReport], bool], **values: object
) -> dict[str, list[ReplicaReport]]:
    """The healthy reports, but the first replica of `shard` for which `which` holds differs."""
    reports = healthy(MAP, list(NODES))
    for rows in reports.values():
        for i, row in enumerate(rows):
            if row.shard == shard and which(row):
                rows[i] = replace(row, **values)  # type: ignore[arg-type]
                return reports
    raise AssertionError("no such replica")


def leads(row: ReplicaReport) -> bool:
    return row.is_leader


def follows(row: ReplicaReport) -> bool:
    return not row.is_leader


@pytest.mark.parametrize(
    ("reports", "name", "message"),
    [
        (changed("s01", leads, is_leader=False), "leaders", "s01 at epoch 1 has no leader"),
        (changed("s01", follows, is_leader=True), "leaders", "both lead s01 at epoch 1 in term 2"),
        (
            changed("s01", follows, is_leader=True, term=1),
            "leaders",
            "takes itself for the leader of s01 at epoch 1 in term 1, and",
        ),
        (changed("s01", follows, digest=b"other"), "digests", "s01 at index 7: n"),
        (changed("s01", follows, needs_reseed=True), "freshness", "needs s01 to be re-seeded"),
        (changed("s01", follows, lag=1_500), "freshness", "1,500 entries behind in s01"),
    ],
)
def test_a_fault_of_one_replica_is_found_by_one_check(
    reports: Reports, name: str, message: str
) -> None:
    found = check(reports)
    assert list(found) == [name]
    assert message in found[name]


def test_a_little_lag_and_a_sealed_epoch_are_no_faults() -> None:
    reports = changed("s01", follows, lag=1_000)
    reports["n1"].append(ReplicaReport("s01", 0, 5, b"old", True, 1, 0, True, is_sealed=True))
    assert check(reports) == {}


def test_a_differing_replica_is_told_from_the_ones_that_agree() -> None:
    reports = healthy(MAP, list(NODES))
    first, second, odd = MAP.shards["s01"].members
    reports[odd] = [
        replace(row, digest=b"other") if row.shard == "s01" else row for row in reports[odd]
    ]
    assert f"{odd} differs from {first}, {second}" in check(reports)["digests"]


def test_replicas_at_different_indexes_are_not_compared() -> None:
    assert check(changed("s01", follows, digest=b"other", applied_index=6)) == {}


def test_a_shard_served_at_two_epochs_is_found() -> None:
    reports = healthy(MAP, list(NODES))
    reports["n1"].append(ReplicaReport("s01", 2, 5, b"new", True, 1, 0, False))
    assert check(reports)["epochs"] == "n1 serves s01 at epoch 2, and the map says 1."


def test_a_replica_that_was_left_behind_is_no_second_epoch() -> None:
    reports = healthy(MAP, list(NODES))
    (outside,) = set(NODES) - set(MAP.shards["s01"].members)
    reports[outside].append(ReplicaReport("s01", 1, 5, b"old", False, 1, 0, False))
    reports[outside].append(ReplicaReport("s77", 1, 5, b"old", False, 1, 0, False))
    found = check(reports)
    assert list(found) == ["leftovers"]
    assert f"{outside} still has s01 at epoch 1, which is on n" in found["leftovers"]
    assert "s77 at epoch 1, which is on no node" in found["leftovers"]


def test_a_shard_without_a_majority_says_whom_to_bring_back() -> None:
    shard_map = make_map({"s00": ["n1", "n2", "n3"]})
    nodes = {**NODES, "n1": NodeState("n1", "a", is_up=False)}
    nodes["n2"] = NodeState("n2", "b", is_lost=True, is_up=False)
    reports = healthy(shard_map, ["n3", "n4"])
    found = check(reports, shard_map=shard_map, nodes=nodes)
    assert found["quorum"] == "s00 has 1 of 3 replicas live and needs 2: bring back n1, n2."
    assert "n1 does not answer; n2 does not answer" in found["answers"]
    assert "s00 has 2 replicas of 3" in found["replication"]
    assert "1 of 3 voters are up and 2 are needed: bring back n1, n2" in found["meta group"]


def test_a_node_that_is_up_without_its_replica_does_not_vote() -> None:
    reports = healthy(MAP, list(NODES))
    first, second, _ = MAP.shards["s01"].members
    for node in (first, second):
        reports[node] = [row for row in reports[node] if row.shard != "s01"]
    found = check(reports)
    assert f"s01 has 1 of 3 replicas live and needs 2: bring back {first}," in found["quorum"]
    assert f"{first} has not opened its replica of s01 at epoch 1" in found["answers"]


def test_too_few_and_too_many_replicas_are_found() -> None:
    few = check(healthy(MAP, list(NODES)), replication=4)["replication"]
    assert few.startswith("s00 has 3 replicas of 4; ") and few.endswith("and 1 more.")
    more = check(healthy(MAP, list(NODES)), replication=2)["replication"]
    assert "s00 has 3 replicas, 2 are wanted" in more
    none = check(healthy(MAP, list(NODES)), replication=5)["replication"]
    assert "nodes that can hold one: 4, add another" in none


def test_crowded_zones_and_overfull_nodes_are_found() -> None:
    shard_map = make_map({f"s{i:02d}": ["n2", "n3", "n4"] for i in range(4)})
    found = check(healthy(shard_map, list(NODES)), shard_map=shard_map)
    assert "s00 has 2 of 3 replicas in zone c, and other zones could" in found["zones"]
    findings = check_cluster(shard_map, NODES, healthy(shard_map, list(NODES)), 3, VOTERS)
    load = next(one for one in findings if one.name == "load")
    assert load.ok, "uneven is no fault"
    assert "n1 has 0 replicas, and 3 to 5 are its part: rebalance" in load.message


@pytest.mark.parametrize(
    ("voters", "message"),
    [
        (("n1", "n2"), "2 voters are an even number"),
        (("n1",), "only 1 of 4 nodes can vote"),
        ((), "0 of 0 voters are up and 1 are needed"),
        (("n1", "n8", "n9"), "1 of 3 voters are up and 2 are needed: bring back n8, n9"),
    ],
)
def test_a_meta_group_that_is_not_safe_is_found(voters: tuple[str, ...], message: str) -> None:
    found = check(healthy(MAP, list(NODES)), voters=voters)
    assert list(found) == ["meta group"]
    assert message in found["meta group"]


def test_a_gap_or_an_overlap_of_slots_is_found() -> None:
    # A map refuses to exist so; what it became in memory since is checked all the same.
    for start, message in (
        (5000, "no shard has slots 4096 to 4999"),
        (4000, "both have slot 4000"),
    ):
        broken = placed_map(NODES, 4, 3)
        broken.shards["s01"] = replace(broken.shards["s01"], slot_start=start)
        assert message in check(healthy(MAP, list(NODES)), shard_map=broken)["slots"]
    short = placed_map(NODES, 4, 3)
    del short.shards["s03"]
    assert (
        "no shard has slots 12288 to 16383"
        in check(healthy(short, list(NODES)), shard_map=short)["slots"]
    )
