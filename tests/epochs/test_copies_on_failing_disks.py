"""A copy whose checkpoint the disk refuses: it must neither count as durable nor wait for ever."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem_node.storage import environment
from agentmem_node.storage.snapshot import CHUNK_BYTES, SnapshotWriter, chunk_hash
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
