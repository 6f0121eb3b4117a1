"""A cluster goes back to a backup: every shard in its next epoch, with the state of that moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentmem_cluster.errors import AgentMemError, NotFound
from agentmem_node.backup.catalog import load
from agentmem_node.backup.objects import open_store
from agentmem_node.model import backups as bk
from tests.epochs.conftest import Cluster, run
from tests.epochs.test_operations import all_there, begin, fill, finished, sound


async def back_up(cluster: Cluster, url: str) -> str:
    node = cluster.any_node()
    work = await node.backups.create(cluster.caller(node), bk.CreateBackup(url=url))
    for _ in range(400):
        shown = await node.backups.get(cluster.caller(node), work.id)
        if shown.state != "running":
            assert shown.state == "done", shown
            assert shown.result is not None
            return str(shown.result.get("backup") or shown.id)
        await asyncio.sleep(0.05)
    raise AssertionError("the backup did not end")


def test_a_cluster_goes_back_to_a_backup_and_on_from_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = str(tmp_path / "backups")
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=2)
        await cluster.start("n1", "n2", "n3")
        try:
            kept = await fill(cluster, 30)
            backup = await back_up(cluster, url)
            later = await fill(cluster, 40)
            await cluster.add("user1", "a last one")
            done = await finished(cluster, await begin(cluster, kind="rewind", url=url))
            assert done.state == "done", done
            manifest = load(open_store(url), backup)
            for node in cluster.nodes.values():
                for shard in manifest.shards:
                    assert node._routing.local[shard.id].info.epoch == 2
            await all_there(cluster, kept)
            for memory_id in later:
                with pytest.raises(NotFound):
                    await cluster.read(memory_id)
            counted = sum(
                local.shard.count() for local in cluster.any_node()._routing.local.values()
            )
            assert counted == len(kept)
            kept |= await fill(cluster, 10)  # it goes on from there
            await all_there(cluster, kept)
            await sound(cluster)
            await cluster.stop()
            await cluster.start("n1", "n2", "n3")
            await all_there(cluster, kept)
        finally:
            await cluster.stop()

    run(scenario, 110)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"url": "/nowhere/at/all"}, "no backup"),
        ({}, "`url` is missing"),
        ({"url": "ftp://x"}, "is not supported"),
        ({"url": "/tmp", "at": "yesterday"}, "at"),
    ],
)
def test_a_way_back_that_is_none_is_refused(
    tmp_path: Path, wish: dict[str, str], says: str
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1"], founders=1, shards=1)
        await cluster.start("n1")
        try:
            with pytest.raises(AgentMemError, match=says):
                await begin(cluster, kind="rewind", **wish)
            node = cluster.any_node()
            assert await node.operations(cluster.caller(node)) == []
        finally:
            await cluster.stop()

    run(scenario)
