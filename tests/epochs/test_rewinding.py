"""A cluster goes back to a backup: every shard in its next epoch, with the state of that moment."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.epochs.replicas import Staged
from agentmem_cluster.errors import AgentMemError, NotFound
from agentmem_node.backup.catalog import load
from agentmem_node.backup.objects import open_store
from agentmem_node.model import backups as bk
from agentmem_node.service.copies import Copies
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


@pytest.mark.parametrize("where", ["the record", "the checkpoint"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_disk_that_refuses_for_a_moment_loses_no_shard_that_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, where: str
) -> None:
    """The old epoch is over by then: what was fetched is all that there is of the shard."""

    async def scenario() -> None:
        url = str(tmp_path / "backups")
        names = [f"n{number + 1}" for number in range(count)]
        cluster = Cluster(tmp_path, names, founders=count, shards=1)
        await cluster.start(*names)
        try:
            kept = await fill(cluster, 10)
            await back_up(cluster, url)
            await fill(cluster, 5)
            refused = dict.fromkeys(names, 3)

            def record_of(node: str) -> LocalRecord:
                replicas = cluster.nodes[node]._replicas
                assert replicas is not None
                return replicas._record

            def refuse(node: str) -> None:
                if refused[node]:
                    refused[node] -= 1
                    raise OSError(errno.EIO, "the disk refuses")

            hold, make_durable = LocalRecord.hold, Copies._make_durable

            def hold_or_not(self: LocalRecord, group: str, held: Held) -> None:
                if (group, held.epoch) == ("s00", 2):
                    refuse(next(n for n in names if record_of(n) is self))
                hold(self, group, held)

            async def make_durable_or_not(self: Copies, staged: Staged) -> None:
                founded = any(change.base is not None for change in self._set.changes.values())
                if staged.info.epoch == 2 and founded:
                    refuse(self._set.node_id)
                await make_durable(self, staged)

            if where == "the record":
                monkeypatch.setattr(LocalRecord, "hold", hold_or_not)
            else:
                monkeypatch.setattr(Copies, "_make_durable", make_durable_or_not)
            done = await finished(cluster, await begin(cluster, kind="rewind", url=url))
            assert done.state == "done", done
            assert any(left < 3 for left in refused.values())
            await all_there(cluster, kept)
            await sound(cluster)
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
