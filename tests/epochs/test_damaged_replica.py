"""A shard's file that is damaged costs the node that replica, and nothing else."""

from __future__ import annotations

from pathlib import Path

from agentmem_cluster.raft.api import GROUP_META
from tests.epochs.conftest import Cluster, run


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
