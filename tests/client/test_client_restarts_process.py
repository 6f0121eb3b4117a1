"""Real nodes restarted, and stopped, under a constant load: what a client notices of it.

The load and the figures are those of `python -m benchmarks.rolling`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem_client import AsyncClient, Topology
from agentmem_node.cli.devcluster import DevCluster
from benchmarks.rolling import (
    MIX,
    READS,
    SETTINGS,
    Load,
    all_ready,
    failures,
    quantile,
    rolling_restart,
    stopped_node,
)

pytestmark = pytest.mark.process

# What the machine's own pauses may add to a single request: it runs three nodes and the load.
PAUSE_S = 0.25


def leaders(topology: Topology) -> set[str]:
    return {shard.leader for shard in topology.shards.values() if shard.leader}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    folder: Path = tmp_path_factory.mktemp("restarts")
    with DevCluster(folder, nodes=3, settings=SETTINGS) as running:
        yield running


def test_a_rolling_restart_fails_no_request_and_p99_stays_under_a_second(
    cluster: DevCluster,
) -> None:
    load, lost = asyncio.run(rolling_restart(cluster))
    p99_s, slowest_s = quantile(load.samples, 0.99), quantile(load.samples, 1.0)
    print(f"{len(load.samples)} requests, p99 {p99_s:.3f} s, slowest {slowest_s:.3f} s")
    assert failures(load.samples) == []
    assert lost == []
    assert len(load.samples) > 200
    assert p99_s < 1.0
    assert cluster.crashes() == []


def test_a_node_that_finishes_its_last_request_is_given_no_shard_back(cluster: DevCluster) -> None:
    """Its peers give shards home to where the map prefers them; a leaving node is no home."""
    victim = cluster.nodes[1]

    async def story() -> tuple[list[set[str]], Load]:
        await all_ready(cluster)
        watched: list[set[str]] = []
        async with AsyncClient(cluster.urls[0]) as client:
            while victim.id not in leaders(await client.cluster()):
                await asyncio.sleep(0.05)
            load = Load(client, ("add",))
            with socket.create_connection(("127.0.0.1", victim.port)) as unfinished:
                # A body that does not end: the node waits for it as long as it waits for anything.
                unfinished.sendall(b"POST /api/v1/memories HTTP/1.1\r\nHost: localhost\r\n")
                unfinished.sendall(b"Content-Length: 100\r\n\r\n{")
                async with load.running():
                    ending = asyncio.create_task(asyncio.to_thread(cluster.terminate, victim.id))
                    while not ending.done():
                        watched.append(leaders(await client.cluster()))
                        await asyncio.sleep(0.1)
                    assert await ending == 0
                    await asyncio.sleep(1.0)
        return watched, load

    watched, load = asyncio.run(story())
    cluster.restart(victim.id)
    leads = [victim.id in names for names in watched]
    print(f"{len(load.samples)} writes, slowest {quantile(load.samples, 1.0):.3f} s")
    assert len(leads) > 20, "the node did not wait for its last request"
    assert not any(leads[10:]), "it was given a shard back"
    assert failures(load.samples) == []
    # No shard had to wait for an election, which takes half a second at least.
    assert quantile(load.samples, 1.0) < 0.5


def test_a_stopped_node_costs_a_read_of_any_replica_one_hedge_delay(cluster: DevCluster) -> None:
    stop = asyncio.run(stopped_node(cluster, READS, consistency="eventual", stopped_s=3.0))
    slowest_s = quantile(stop.during, 1.0)
    print(f"hedge delay {stop.hedge_s:.3f} s, slowest {slowest_s:.3f} s")
    assert failures([*stop.before, *stop.during]) == []
    assert slowest_s <= quantile(stop.before, 1.0) + stop.hedge_s + PAUSE_S
    # Whoever came after the first few did not wait for it at all.
    assert quantile(stop.during, 0.9) < stop.hedge_s


def test_a_stopped_node_fails_no_request_and_loses_nothing(cluster: DevCluster) -> None:
    stop = asyncio.run(stopped_node(cluster, MIX, stopped_s=4.0))
    slowest_s = quantile(stop.during, 1.0)
    print(f"hedge delay {stop.hedge_s:.3f} s, slowest {slowest_s:.3f} s")
    assert failures([*stop.before, *stop.during]) == []
    assert stop.lost == []
    # A shard that it led answers again once it has another leader: two elections at the worst.
    assert slowest_s <= stop.hedge_s + 2.5 + PAUSE_S
