"""A voter of the meta group whose state an older version has read, and written as it understood it.

Real nodes on one loop; that other version's part is played by the state on the disk, with exactly
what the previous release leaves out of it.
"""

from __future__ import annotations

from pathlib import Path

import msgpack

from agentmem_cluster.meta import LEVEL, MetaStateMachine
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.realtime import RealDisk
from agentmem_node.service.node import Node
from tests.epochs.conftest import Cluster, run

KEPT_OF_A_NODE = ("peer", "http", "version")
KEPT_OF_THE_STATE = ("settings", "map", "nodes", "kv")


def levels(node: Node) -> dict[str, int]:
    view = node._membership.view if node._membership else None
    return {} if view is None else {name: info.level for name, info in view.nodes.items()}


def write_as_older(folder: Path) -> None:
    disk = RealDisk(folder)
    image = msgpack.unpackb(MetaStateMachine(disk).image())
    state = {key: image["state"][key] for key in KEPT_OF_THE_STATE}
    state["nodes"] = {
        name: {key: info[key] for key in KEPT_OF_A_NODE} for name, info in state["nodes"].items()
    }
    MetaStateMachine.install(disk, "meta", msgpack.packb(image | {"state": state}))


def test_nodes_say_again_what_an_older_version_left_out(tmp_path: Path) -> None:
    """Whoever registered meanwhile is known to all others: it would never do so by itself."""

    async def scenario() -> None:
        names = ["n1", "n2", "n3"]
        cluster = Cluster(tmp_path, names)
        cluster.overrides["storage.checkpoint_ms"] = 10
        try:
            await cluster.start(*names)
            wanted = dict.fromkeys(names, LEVEL)
            for node in cluster.nodes.values():
                await cluster.until(lambda node=node: levels(node) == wanted, "all levels")
            host = cluster.nodes["n2"]._host
            assert host is not None

            def is_kept() -> bool:
                status = host.groups[GROUP_META].status()
                return status.durable_index == status.applied_index == status.commit_index

            await cluster.until(is_kept, "a checkpoint of all")
            await cluster.stop("n2")
            write_as_older(tmp_path / "n2")
            assert not MetaStateMachine(RealDisk(tmp_path / "n2")).state.nodes["n1"].incarnation
            await cluster.start("n2")
            again = cluster.nodes["n2"]
            await cluster.until(lambda: levels(again) == wanted, "levels of all nodes again")
        finally:
            await cluster.stop()

    run(scenario)
