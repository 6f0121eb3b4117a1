"""One cluster of real processes for all tests here: nodes end in it, and come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.failpoints.cluster import FaultyCluster


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCluster]:
    """Four nodes, two shards of three replicas: each shard has one node to move to."""
    with FaultyCluster(tmp_path_factory.mktemp("c"), 4, {"cluster.shards": 2}) as running:
        running.soundly()
        yield running


@pytest.fixture
def cluster(started: FaultyCluster) -> FaultyCluster:
    """With all nodes up and unarmed, whatever the test before left behind."""
    for name in started.names:
        if not started.is_running(name):
            started.restart(name)
        started.disarm(name)
    started.crashes()  # they are known
    return started
