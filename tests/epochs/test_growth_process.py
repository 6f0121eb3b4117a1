"""A cluster of processes grows and shrinks under a constant load, and no request fails.

The load and the figures are those of `python -m benchmarks.growth`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentmem_node.cli.devcluster import DevCluster
from benchmarks.growth import grow_and_shrink, growth_rows
from benchmarks.rolling import SETTINGS

pytestmark = pytest.mark.process


def test_three_nodes_become_four_and_three_again_and_no_request_fails(tmp_path: Path) -> None:
    settings = SETTINGS | {"cluster.shards": 4}
    with DevCluster(tmp_path, nodes=3, settings=settings) as cluster:
        growth = asyncio.run(grow_and_shrink(cluster, joiners=1, settle_s=0.5))
        for row in growth_rows(growth, "3-4-3"):
            print(row.name, row.value, row.unit)
        assert growth.failed == []
        assert growth.lost == []
        assert growth.broken == []
        assert len(growth.load.samples) > 100
        # There and back again, each under writes of its own.
        assert len(growth.moves) >= 4
        assert all(move.probes for move in growth.moves)
        assert [node.id for node in cluster.nodes] == ["n1", "n2", "n3"]
        assert cluster.crashes() == []
