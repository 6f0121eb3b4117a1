"""A copy whose checkpoint the disk refuses: it must neither count as durable nor wait for ever."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.replicas import Staged
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.errors import AgentMemError, InternalError, Unavailable
from agentmem_cluster.realtime import RealClock
from agentmem_cluster.shardmap import ShardInfo
from agentmem_node.engine.shard import Shard
from agentmem_node.service.copies import Copies
from agentmem_node.service.copying import Paused
from agentmem_node.service.folders import Folders
from agentmem_node.storage import environment
from agentmem_node.storage.snapshot import CHUNK_BYTES, SnapshotWriter, chunk_hash
from tests.backup.making import DIM, MAP_BYTES, add, entry
from tests.epochs.conftest import Cluster, run
from tests.epochs.test_moving_a_shard import move

NEW = ("n4", "n5", "n6")


class Refusals:
    """Lets the first syncs of two copies of three fail: nothing is founded without one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, code: int) -> None:
        self.left = {f"{node}/shards/s00-e2/": times for node in NEW[:2]}
        self._code = code
        real = getattr(environment, name)
        monkeypatch.setattr(environment, name, self._refusing(real))

    def _refusing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(where: int | Path, *args: Any) -> Any:
            path = (
                str(Path(f"/proc/self/fd/{where}").readlink())
                if isinstance(where, int)
                else f"{where}/"
            )
            for copy, left in self.left.items():
                if left and copy in path:
                    self.left[copy] -= 1
                    raise OSError(self._code, os.strerror(self._code))
            return real(where, *args)

        return refuse


@pytest.mark.parametrize(
    ("name", "code", "times"),
    [
        ("_datasync", errno.EIO, 1),
        ("write_checkpoint", errno.EIO, 1),
        ("write_checkpoint", errno.ENOSPC, 3),
    ],
)
def test_a_copy_that_could_not_be_synced_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", *NEW], shards=1)
        await cluster.start("n1", "n2", "n3")
        for node in NEW:
            await cluster.admit(node)
        await cluster.start(*NEW)
        try:
            memory_ids = [await cluster.add("ada", f"memory {n}") for n in range(20)]
            refusals = Refusals(monkeypatch, name, times, code)
            leader = cluster.meta_leader()
            assert leader is not None
            assert await leader.changes.begin(move(cluster, "s00", list(NEW))) == ""
            for node in NEW:
                replicas = cluster.nodes[node]._replicas
                assert replicas is not None
                await cluster.until(
                    lambda: "s00" in replicas.set.served and not replicas.set.changes,  # noqa: B023
                    f"{node} serves s00",
                )
            assert all(left < times for left in refusals.left.values())
            await cluster.stop(*NEW)
            await cluster.start(*NEW)
            for memory_id in memory_ids:
                await cluster.read(memory_id, through=cluster.nodes["n4"])
        finally:
            await cluster.stop()

    run(scenario)


def test_what_stood_there_already_is_written_again_so_that_the_last_sync_covers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed sync its pages pass for clean, and the next sync succeeds without them."""
    chunks = [os.urandom(CHUNK_BYTES) for _ in range(3)]
    first = SnapshotWriter(tmp_path / "copy", 3 * CHUNK_BYTES)
    for number, data in enumerate(chunks):
        first.write(number, data)
    first.close()

    written: list[tuple[int, bytes]] = []
    pwrite = os.pwrite

    def watched(fd: int, data: bytes | memoryview, offset: int) -> int:
        written.append((offset, bytes(data)))
        return pwrite(fd, data, offset)

    second = SnapshotWriter(tmp_path / "copy", 3 * CHUNK_BYTES)
    monkeypatch.setattr(os, "pwrite", watched)
    try:
        assert second.hash_of(1) == chunk_hash(chunks[1])
    finally:
        second.close()
    assert written == [(CHUNK_BYTES, chunks[1])]


def a_copy(folder: Path) -> tuple[Copies, Staged, Shard]:
    """A copy of an epoch that serves, and of the driver what its task needs."""
    info = ShardInfo("s00", 2, ("n1", "n2", "n3"), "n1", 0, 16_384)
    staged = Staged(info, "c1", 2, "s00-e2")
    shard = Shard.open(folder / "s00-e2", "s00", dim=DIM, map_size=MAP_BYTES)
    shard.apply([entry(1, add(1))])
    staged.machine = EpochMachine(shard, 2)
    replicas = cast("Any", SimpleNamespace(node_id="n1", staged={"s00": staged}, changes={}))
    copies = Copies(
        replicas,
        Folders(folder, replicas, RealClock()),
        link=cast("Any", SimpleNamespace(call=None)),
        routing=cast("Any", None),
        clock=RealClock(),
        here={},
        open_shard=cast("Any", None),
        bytes_per_s=0,
        on_change=lambda: None,
    )
    return copies, staged, shard


@pytest.mark.parametrize("failure", [Paused("compacted"), Unavailable("the source is gone")])
def test_a_copy_that_became_a_replica_is_not_touched_by_its_task_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: AgentMemError
) -> None:
    async def scenario() -> None:
        copies, staged, shard = a_copy(tmp_path)

        async def tail(*_: object) -> None:
            del copies._set.staged["s00"]  # it takes part now
            assert shard.checkpoint() is not None  # and the host makes a checkpoint of it
            raise failure

        monkeypatch.setattr("agentmem_node.service.copies.tail", tail)
        await copies._copy(staged, "s00", "n2")
        assert (tmp_path / "s00-e2").is_dir()
        assert shard.count() == 1  # it is open
        shard.close()

    asyncio.run(scenario())


def test_a_copy_whose_state_failed_is_no_durable_one_and_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        copies, staged, shard = a_copy(tmp_path)
        monkeypatch.setattr(
            shard._store.env, "begin_checkpoint", lambda: (_ for _ in ()).throw(RuntimeError("x"))
        )
        with pytest.raises(RuntimeError, match="x"):
            await copies._make_durable(staged)
        assert shard.has_failed
        copies._fail(staged, "n2", InternalError("it failed earlier"))
        assert (staged.machine, staged.state) == (None, Staging.FAILED)

        copies, staged, shard = a_copy(tmp_path)
        monkeypatch.setattr(shard._store.env, "begin_checkpoint", lambda: None)
        with pytest.raises(InternalError, match="cannot be written"):
            await copies._make_durable(staged)
        shard.close()

    asyncio.run(scenario())
