"""What the conductor said twice, or what the network kept: it comes when its change is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.epochs.conftest import Cluster, run
from tests.epochs.test_copies import AFTER, BASE, BEFORE, MOVE, NEW, World, world
from tests.epochs.test_moving_a_shard import move

__all__ = ["world"]


def test_a_late_order_to_copy_leaves_the_replica_that_came_of_the_first_one_alone(
    tmp_path: Path,
) -> None:
    """The copy's folder has the replica's name: it was renamed under the running shard, and the
    shard's own files became the ground that the second copy was written on."""

    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], shards=1)
        await cluster.start("n1", "n2", "n3")
        await cluster.admit("n4")
        await cluster.start("n4")
        try:
            memory_ids = [await cluster.add("ada", f"memory {n}") for n in range(20)]
            leader = cluster.meta_leader()
            assert leader is not None
            change = move(cluster, "s00", ["n4", "n2", "n3"])
            assert await leader.changes.begin(change) == ""
            replicas = cluster.nodes["n4"]._replicas
            assert replicas is not None
            await cluster.until(
                lambda: "s00" in replicas.set.served and not replicas.set.changes, "n4 serves s00"
            )
            files = tmp_path / "n4" / "shards" / "s00-e2"
            inodes = {file.name: file.stat().st_ino for file in files.iterdir()}
            late = {"change": change.to_wire(), "shard": "s00", "source": "n2"}
            for source in ("n4", "n2", "n3"):
                await replicas.handlers["replica.stage"](source, {**late, "source": source})
            memory_ids += [await cluster.add("ada", f"memory {n}") for n in range(20, 40)]
            await asyncio.sleep(0.3)
            assert not replicas.set.staged
            assert {file.name: file.stat().st_ino for file in files.iterdir()}.items() >= {
                ("data.mdb", inodes["data.mdb"])
            }
            left = cluster.nodes["n1"]._replicas
            assert left is not None
            await cluster.until(
                lambda: "s00" not in left.set.served and not left.folders._lingering,
                "n1 has left s00",
            )
            shards = tmp_path / "n1" / "shards"
            for name in ("s00-e1.partial", "s00-e2", "s00-e3.partial", "another"):
                (shards / name).mkdir()
            # What was fetched for a rewind that was given up, and for one that is to come.
            for name in ("s00-e2.fetch", "s00-e2.fetch.origin.fetch.partial", "s00-e3.fetch"):
                (shards / name).mkdir()
                (shards / f"{name}.json").write_text("{}")
            left.folders.sweep()
            assert sorted(path.name for path in shards.iterdir()) == [
                "another",
                "s00-e3.fetch",
                "s00-e3.fetch.json",
                "s00-e3.partial",
            ]
            replicas.folders.sweep()
            assert files.is_dir()
            # Put aside, it may be the last there is, whatever epoch its folder is called by.
            held, served = replicas._record.held.pop("s00"), replicas.set.served.pop("s00")
            (files.with_name("s00-e1.partial")).mkdir()
            replicas.folders.sweep()
            replicas._record.held["s00"], replicas.set.served["s00"] = held, served
            assert files.is_dir() and files.with_name("s00-e1.partial").is_dir()
            await cluster.stop("n4")
            await cluster.start("n4")
            for memory_id in memory_ids:
                await cluster.read(memory_id, through=cluster.nodes["n4"])
        finally:
            await cluster.stop()

    run(scenario)


def test_a_copy_begins_neither_into_a_replica_nor_for_an_epoch_that_is_closed(
    world: World,
) -> None:
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    world.copy(replicas, NEW)
    replicas.learn(AFTER, {"s00": MOVE.founded(BASE)}, 6)
    assert not replicas.may_copy(NEW)
    with pytest.raises(ValueError, match="epoch 2 of s00"):
        replicas.begin_copy(NEW, "c1", 1)
    assert replicas.served["s00"].folder in world.states
    assert replicas.close("s00", 2)
    assert not replicas.may_copy(NEW)
