"""A shard's file that is damaged costs the node that replica, and nothing else."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from agentmem_cluster.raft.api import GROUP_META
from agentmem_node.model.ids import parse_id
from agentmem_node.storage.walk import find_broken
from tests.epochs.conftest import Cluster, run
from tests.epochs.test_moving_a_shard import move


def test_a_damaged_shard_is_put_aside_and_the_node_stays_in_the_meta_group(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = ["n1", "n2", "n3"]
        cluster = Cluster(tmp_path, names)
        await cluster.start(*names)
        try:
            memory_ids = [await cluster.add(f"user{n}", f"memory {n}") for n in range(20)]
            await cluster.stop("n3")
            damaged = tmp_path / "n3" / "shards" / "s01-e1" / "data.mdb"
            with damaged.open("r+b") as file:
                file.truncate(2 * 4_096)  # the two meta pages only
            await cluster.start("n3")
            node = cluster.nodes["n3"]
            replicas = node._replicas
            assert replicas is not None
            assert GROUP_META in replicas._record.held
            assert replicas._record.closed.get("s01") == 1, "it never votes there again"
            assert "s00" in replicas.set.served
            for memory_id in memory_ids:
                await cluster.read(memory_id, through=node)
        finally:
            await cluster.stop()

    run(scenario)


def test_a_replica_whose_rows_have_rotted_is_made_anew_from_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = ["n1", "n2", "n3"]
        cluster = Cluster(tmp_path, names, shards=1)
        await cluster.start(*names)
        try:
            memory_ids = [await cluster.add("ada", f"memory {n:04}") for n in range(50)]
            await cluster.stop("n3")
            rot(tmp_path / "n3" / "shards" / "s00-e1" / "data.mdb", b"0007", b"0008")
            await cluster.start("n3")
            node = cluster.nodes["n3"]
            replicas = node._replicas
            assert replicas is not None
            await cluster.until(lambda: replicas.damaged, "it is found, though nobody reads it")
            await cluster.until(lambda: not replicas.damaged, "it is made anew")
            assert replicas.set.served["s00"].info.epoch == 2
            for number, memory_id in enumerate(memory_ids):
                found = await cluster.read(memory_id, through=node)
                assert f"memory {number:04}".encode() in bytes(found.memory)
        finally:
            await cluster.stop()

    run(scenario)


def test_two_replicas_of_three_that_have_rotted_are_made_anew_from_the_third(
    tmp_path: Path,
) -> None:
    """They vote meanwhile: were they put aside, the shard would have no quorum left to found its
    next epoch by. A write that builds on a damaged row ends nothing either."""

    async def scenario() -> None:
        names = ["n1", "n2", "n3"]
        cluster = Cluster(tmp_path, names, shards=1)
        cluster.overrides["storage.scrub_s"] = 0  # only who uses a row finds that it is damaged
        await cluster.start(*names)
        try:
            memory_ids = [await cluster.add("ada", f"memory {n:04}") for n in range(50)]
            for name, was, now in (("n2", b"0007", b"0008"), ("n3", b"0009", b"0005")):
                await cluster.stop(name)
                rot(tmp_path / name / "shards" / "s00-e1" / "data.mdb", was, now)
                await cluster.start(name)
            for number, memory_id in enumerate(memory_ids):
                for node in cluster.nodes.values():
                    found = await cluster.read(memory_id, through=node)
                    assert f"memory {number:04}".encode() in bytes(found.memory)
            for number in (7, 9):
                await cluster.delete(memory_ids[number])
            replicas = [node._replicas for node in cluster.nodes.values()]
            await cluster.until(
                lambda: all(
                    one is not None and not one.damaged and one.set.served["s00"].info.epoch > 1
                    for one in replicas
                ),
                "both are made anew",
            )
            shards = [node._routing.local["s00"].shard for node in cluster.nodes.values()]
            await cluster.until(
                lambda: len({(shard.applied_index, shard.digest()) for shard in shards}) == 1,
                "all are equal",
            )
            assert all(shard.count() == 48 for shard in shards)
        finally:
            await cluster.stop()

    run(scenario)


def test_rot_is_not_copied_to_another_node(tmp_path: Path) -> None:
    """Nobody has noticed yet that the follower which is copied from has rotted."""

    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], shards=1)
        cluster.overrides["storage.scrub_s"] = 0
        await cluster.start("n1", "n2", "n3")
        await cluster.admit("n4")
        await cluster.start("n4")
        try:
            memory_ids = [await cluster.add("ada", f"memory {n:04}") for n in range(50)]
            followers = {
                name
                for name in ("n1", "n2", "n3")
                if not cluster.nodes[name]._routing.local["s00"].group.is_leader
            }
            rotten, other = sorted(followers)  # the first one is copied from
            await cluster.stop(rotten)  # so that everything is in its file
            rot(tmp_path / rotten / "shards" / "s00-e1" / "data.mdb", b"0007", b"0008")
            await cluster.start(rotten)
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            leader = cluster.meta_leader()
            assert leader is not None
            change = move(cluster, "s00", [rotten, other, "n4"])
            assert await leader.changes.begin(change) == ""
            copied = cluster.nodes["n4"]._replicas
            source = cluster.nodes[rotten]._replicas
            assert copied is not None and source is not None
            await cluster.until(lambda: source.damaged, "the source learns that it has rotted")
            await cluster.until(
                lambda: any(
                    one.info.epoch > 1 and one.machine.has_begun
                    for one in copied.set.served.values()
                ),
                "n4 serves a copy of another's",
            )
            await cluster.until(lambda: not source.damaged, "the source is made anew")
            for node in (cluster.nodes[rotten], cluster.nodes["n4"]):
                assert node._replicas is not None and not node._replicas.damaged
                shard = node._routing.local["s00"].shard
                for number, memory_id in enumerate(memory_ids):
                    stored = shard.get("default", parse_id(memory_id))
                    assert stored is not None and f"memory {number:04}".encode() in stored.record
        finally:
            await cluster.stop()

    run(scenario)


def test_a_page_that_ends_who_reads_it_costs_the_replica_and_not_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = ["n1", "n2", "n3"]
        cluster = Cluster(tmp_path, names, shards=2)
        await cluster.start(*names)
        try:
            memory_ids = [await cluster.add(f"user{n}", f"memory {n:04} " * 300) for n in range(50)]
            await cluster.stop("n3")
            shards = tmp_path / "n3" / "shards"
            assert await find_broken([shards / "s00-e1", shards / "s01-e1"]) == set()
            lengthen(shards / "s00-e1" / "data.mdb")
            assert await find_broken([shards / "s00-e1", shards / "s01-e1"]) == {shards / "s00-e1"}
            await cluster.start("n3")
            replicas = cluster.nodes["n3"]._replicas
            assert replicas is not None and "s01" in replicas.set.served
            await cluster.until(
                lambda: "s00" in replicas.set.served and replicas.set.served["s00"].info.epoch == 2,
                "it is made anew",
            )
            for memory_id in memory_ids:
                await cluster.read(memory_id, through=cluster.nodes["n3"])
        finally:
            await cluster.stop()

    run(scenario)


def lengthen(file: Path) -> None:
    """Let LMDB believe that rows which have pages of their own reach far past the file's end."""
    data = bytearray(file.read_bytes())
    # A node: the length of its data (low, high), flags (1: on other pages), the length of its key.
    nodes = list(re.finditer(rb"\x01\x00\x08\x00\x00{7}[\x01-\xff]", data))
    assert nodes
    for node in nodes:
        struct.pack_into("<H", data, node.start() - 2, 0x1000)
    file.write_bytes(data)


def rot(file: Path, was: bytes, now: bytes) -> None:
    data = file.read_bytes()
    assert b"memory " + was in data
    file.write_bytes(data.replace(b"memory " + was, b"memory " + now))
