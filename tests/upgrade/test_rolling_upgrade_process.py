"""Nodes of the previous release and of this one, side by side under a constant load, and back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem_client import AsyncClient
from agentmem_cluster.meta import LEVEL
from agentmem_node.cli.devlayout import NodeFiles
from benchmarks.rolling import MIX, Load, failures, quantile
from tests.upgrade.mixed import MixedCluster, until
from tests.upgrade.previous import Release

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]

SETTINGS = {
    "embedding.provider": "none",
    "embedding.dim": 0,
    "cluster.shards": 4,
    # So that what a version has read it has also written: the next would read it from the journal.
    "storage.checkpoint_ms": 500,
}
RATE_PER_S = 80.0
READERS = 8
# The previous release is older than nodes that say what they understand: that counts as 1.
LEVEL_OF_RELEASE = 1


async def lost(load: Load) -> list[str]:
    """As `Load.lost`, several at a time."""
    stored = list(load.stored.items())
    parts = [Load(load.client, MIX, stored=dict(stored[n::READERS])) for n in range(READERS)]
    return [one for found in await asyncio.gather(*(p.lost() for p in parts)) for one in found]


def under_load(cluster: MixedCluster, story: Callable[[], None]) -> None:
    """While `story` happens no request fails; what was acknowledged is there, nothing crashed.

    Prints what clients noticed.
    """

    async def run() -> Load:
        async with AsyncClient(cluster.urls) as client:
            load = Load(client, MIX, rate_per_s=RATE_PER_S)
            await load.fill()
            async with load.running():
                await asyncio.to_thread(story)
            assert failures(load.samples) == []
            assert await lost(load) == []
            return load

    load = asyncio.run(run())
    p99_s, slowest_s = quantile(load.samples, 0.99), quantile(load.samples, 1.0)
    print(f"{len(load.samples)} requests, 0 failed, p99 {p99_s:.3f} s, slowest {slowest_s:.3f} s")
    cluster.check_digests()
    assert cluster.crashes() == []


def check_levels(cluster: MixedCluster) -> None:
    """Every node of this version knows which others run the previous release.

    While one of those leads the meta group they cannot know that another does not.
    """
    for node in cluster.nodes:
        if node.id not in cluster.old:
            until(lambda node=node: knows_levels(cluster, node), f"the levels as {node.id} says")


def knows_levels(cluster: MixedCluster, node: NodeFiles) -> bool:
    told = {name: one["level"] for name, one in cluster.view(node).get("nodes", {}).items()}
    if not cluster.old:
        return bool(told) and set(told.values()) == {LEVEL}
    return bool(told) and {told[name] for name in cluster.old} == {LEVEL_OF_RELEASE}


def check_moves_are_refused(cluster: MixedCluster) -> None:
    """By every node that knows moves, with the names of those that do not."""
    move = {"kind": "move", **a_move(cluster)}
    for node in cluster.nodes:
        if node.id not in cluster.old:
            status, told = cluster.post(node, "/cluster/operations", move)
            assert status == 503, told
            detail = str(told["detail"])
            assert detail.startswith("Shards cannot be moved yet") and "older version" in detail
            assert all(name in detail for name in cluster.old), (detail, cluster.old)


def shards(cluster: MixedCluster) -> dict[str, Any]:
    """Of any node that answers."""
    views = (cluster.view(node) for node in cluster.nodes)
    found: dict[str, Any] = next(view["shards"] for view in views if view)
    return found


def a_move(cluster: MixedCluster, without: str = "") -> dict[str, str]:
    """A move of some shard to the node that lacks it, in which node `without` has no part."""
    for shard, told in shards(cluster).items():
        (target,) = {node.id for node in cluster.nodes} - set(told["members"])
        leaving = [member for member in told["members"] if member != without]
        if target != without:
            return {"shard": shard, "node": target, "away_from": leaving[0]}
    raise AssertionError(f"every shard lacks {without}")


def move(cluster: MixedCluster, through: NodeFiles, wanted: dict[str, str]) -> None:
    epoch = shards(cluster)[wanted["shard"]]["epoch"]
    status, begun = cluster.post(through, "/cluster/operations", {"kind": "move", **wanted})
    assert status in (200, 202), begun

    def is_done() -> bool:
        told = shards(cluster)[wanted["shard"]]
        return told["epoch"] == epoch + 1 and wanted["node"] in told["members"]

    until(is_done, f"{wanted}: {begun}")


def format_of(node: NodeFiles) -> int:
    return int(json.loads((node.directory / "data" / "node.json").read_text())["format"])


def test_a_cluster_is_upgraded_put_back_and_upgraded_again_and_moves_shards_only_then(
    tmp_path: Path, release: Release
) -> None:
    def change_all(to_old: bool) -> None:
        for node in cluster.nodes:
            cluster.change(node.id, to_old=to_old)
            cluster.check_digests()
            check_levels(cluster)
            if 0 < len(cluster.old) < len(cluster.nodes):
                check_moves_are_refused(cluster)
        assert {format_of(node) for node in cluster.nodes} == {1}

    def move_a_shard() -> None:
        move(cluster, first, a_move(cluster))
        cluster.check_digests()

    def move_while_one_is_away() -> None:
        move(cluster, first, a_move(cluster, without=away.id))
        until(lambda: format_of(first) == 2, "the mark of no return")

    def come_back_old() -> None:
        cluster.begin(away.id, old=True, wait_s=0)
        until(lambda: "runs an older version" in first.log.read_text(), "its refusal")
        until(lambda: bool(cluster.view(away)), "its own view")
        status, told = cluster.post(
            away, "/memories/search", {"query": "parcel", "user_id": "owner-1"}
        )
        assert status == 503, told
        assert not any(cluster.view(node)["nodes"][away.id]["up"] for node in others)
        cluster.change(away.id, to_old=False)

    with MixedCluster(tmp_path, release, nodes=4, old={1, 2, 3, 4}, settings=SETTINGS) as cluster:
        first, away = cluster.nodes[0], cluster.nodes[2]  # both vote on what the cluster is
        others = [node for node in cluster.nodes if node is not away]
        assert all("level" not in cluster.view(node)["nodes"]["n1"] for node in cluster.nodes)
        for to_old in (False, True, False):
            under_load(cluster, lambda to_old=to_old: change_all(to_old))

        assert cluster.terminate(away.id) == 0
        move_while_one_is_away()
        come_back_old()
        under_load(cluster, move_a_shard)

        for node in cluster.nodes:
            assert cluster.terminate(node.id) == 0
            cluster.begin(node.id, old=True, wait_s=0)
            code, said = cluster.wait_for_end(node.id, 30.0)
            assert code == 2 and "was written by a newer version" in said
            cluster.begin(node.id, old=False)
        under_load(cluster, cluster.check_digests)
        check_levels(cluster)
