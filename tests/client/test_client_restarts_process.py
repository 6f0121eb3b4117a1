"""Real nodes restarted, and stopped, under a constant load: what a client notices of it.

The load and the figures are those of `python -m benchmarks.rolling`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem_node.cli.devcluster import DevCluster
from benchmarks.rolling import (
    MIX,
    READS,
    SETTINGS,
    failures,
    quantile,
    rolling_restart,
    stopped_node,
)

pytestmark = pytest.mark.process

# What the machine's own pauses may add to a single request: it runs three nodes and the load.
PAUSE_S = 0.25


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
