"""GET /metrics: readable by Prometheus, complete, bounded, and a tenant's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agentmem_node.observe.histogram import BOUNDS_S, Histogram
from agentmem_node.observe.metrics import InFlight, Metrics
from agentmem_node.observe.snapshot import (
    CacheSnapshot,
    EmbeddingSnapshot,
    GroupSnapshot,
    JournalSnapshot,
    NodeSnapshot,
    PeerSnapshot,
    ShardSnapshot,
)

SNAPSHOT = NodeSnapshot(
    node_id="n1",
    version="0.1.0",
    map_version=3,
    disk_free_bytes=10**9,
    groups=[GroupSnapshot("s01", "leader", 4, True, 118, 117, 118, queued_writes=2)],
    shards=[ShardSnapshot("s01", 12, 4096, vectors=12, index_blocks=3, index_bytes=5000)],
    journal=JournalSnapshot(size_bytes=1 << 20, segments=1, syncs=50, sync_seconds=0.25),
    peers=[PeerSnapshot("n2", True, sent_bytes=7)],
    caches=[CacheSnapshot("embedding", hits=3, misses=1), CacheSnapshot("unused", 0, 0)],
    embedding=EmbeddingSnapshot(texts=4, seconds=0.5),
    plugin_calls={("dedupe", "ok"): 5},
)


def samples(metrics: Metrics, tenant: str = "ana") -> dict[tuple[str, tuple[Any, ...]], float]:
    content_type, body = metrics.exposition(tenant)
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_the_four_names_of_old_are_there() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    metrics.added("ana", 3)
    metrics.searched("ana", 0.004)
    found = samples(metrics)
    ana = (("tenant", "ana"),)
    assert found["agentmem_add_memory_total", ana] == 3
    assert found["agentmem_search_duration_seconds_count", ana] == 1
    assert found["agentmem_search_duration_seconds_sum", ana] == pytest.approx(0.004)
    assert found["agentmem_cache_hit_ratio", (("cache", "embedding"),)] == 0.75
    calls = (("outcome", "ok"), ("plugin", "dedupe"))
    assert found["agentmem_plugin_calls_total", calls] == 5


def test_what_an_operator_needs_is_there() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    metrics.watch(lambda: InFlight({"search": 2}, 9, 1000, 4, 1))
    metrics.request("POST", "/api/v1/memories", 201, 0.002)
    metrics.request("POST", "/api/v1/memories", 429, 0.0001)
    found = samples(metrics)
    group, shard = (("group", "s01"),), (("shard", "s01"),)
    for name, labels, value in (
        ("agentmem_raft_term", group, 4),
        ("agentmem_raft_is_leader", group, 1),
        ("agentmem_raft_commit_index", group, 118),
        ("agentmem_raft_applied_index", group, 117),
        ("agentmem_raft_durable_index", group, 118),
        ("agentmem_raft_queued_writes", group, 2),
        ("agentmem_shard_memories", shard, 12),
        ("agentmem_shard_bytes", shard, 4096),
        ("agentmem_index_blocks", shard, 3),
        ("agentmem_index_bytes", shard, 5000),
        ("agentmem_journal_bytes", (), 1 << 20),
        ("agentmem_journal_fsyncs_total", (), 50),
        ("agentmem_journal_fsync_seconds_total", (), 0.25),
        ("agentmem_link_connected", (("peer", "n2"),), 1),
        ("agentmem_http_connections", (), 9),
        ("agentmem_http_requests_in_flight", (("class", "search"),), 2),
        ("agentmem_http_requests_refused_total", (), 4),
    ):
        assert found[name, labels] == value, name
    for status in ("201", "429"):
        labels = (("method", "POST"), ("route", "/api/v1/memories"), ("status", status))
        assert found["agentmem_http_requests_total", labels] == 1
    assert any(name == "process_resident_memory_bytes" for name, _ in found)


def test_a_cache_that_was_never_asked_has_no_ratio() -> None:
    found = samples(Metrics(lambda: SNAPSHOT))
    assert ("agentmem_cache_hit_ratio", (("cache", "unused"),)) not in found


def test_a_tenant_sees_its_own_series_only() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    metrics.added("ana", 1)
    metrics.added("ben", 2)
    metrics.searched("ben", 0.1)
    assert b"ben" not in metrics.exposition("ana")[1]
    assert samples(metrics, "ben")["agentmem_add_memory_total", (("tenant", "ben"),)] == 2
    assert samples(metrics, "new")["agentmem_add_memory_total", (("tenant", "new"),)] == 0


def test_tenants_do_not_grow_memory_without_bound() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    for number in range(5_000):
        metrics.added(f"tenant-{number}", 1)
        metrics.searched(f"tenant-{number}", 0.001)
    assert len(metrics._tenants) <= 201


def test_hostile_labels_stay_labels() -> None:
    metrics = Metrics(lambda: SNAPSHOT)
    tenant = 'a"} 1\nfake_metric 5\\'
    metrics.added(tenant, 1)
    found = samples(metrics, tenant)
    assert found["agentmem_add_memory_total", (("tenant", tenant),)] == 1
    assert not any(name == "fake_metric" for name, _ in found)


@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=50))
def test_a_histogram_counts_each_value_once_in_its_bucket(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    buckets = histogram.buckets()
    assert histogram.count == len(values)
    assert histogram.sum_s == pytest.approx(math.fsum(values))
    for (label, count), bound in zip(buckets, (*BOUNDS_S, math.inf), strict=True):
        assert float(label) == bound
        assert count == sum(value <= bound for value in values)
