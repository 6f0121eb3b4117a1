"""The node's state as Prometheus families: Raft, shards, indexes, journal, links, caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agentmem_node.observe.snapshot import (
    GroupSnapshot,
    NodeSnapshot,
    PeerSnapshot,
    ShardSnapshot,
)

Item = TypeVar("Item")

# (name, meaning, value, whether it only grows)
_GROUP: tuple[tuple[str, str, Callable[[GroupSnapshot], float], bool], ...] = (
    ("agentmem_raft_term", "The group's term.", lambda g: g.term, False),
    ("agentmem_raft_is_leader", "1 on the group's leader.", lambda g: g.role == "leader", False),
    ("agentmem_raft_has_leader", "1 when a leader is known.", lambda g: g.has_leader, False),
    ("agentmem_raft_commit_index", "Last committed entry.", lambda g: g.commit_index, False),
    ("agentmem_raft_applied_index", "Last applied entry.", lambda g: g.applied_index, False),
    ("agentmem_raft_durable_index", "Last entry on disk.", lambda g: g.durable_index, False),
    (
        "agentmem_raft_queued_writes",
        "Writes that wait for the group's quorum.",
        lambda g: g.queued_writes,
        False,
    ),
    ("agentmem_raft_elections", "Elections this node stood for.", lambda g: g.elections, True),
)
_SHARD: tuple[tuple[str, str, Callable[[ShardSnapshot], float], bool], ...] = (
    ("agentmem_shard_memories", "Live memories.", lambda s: s.memories, False),
    ("agentmem_shard_bytes", "Bytes of the shard's database.", lambda s: s.record_bytes, False),
    ("agentmem_index_vectors", "Vectors in the index.", lambda s: s.vectors, False),
    (
        "agentmem_index_blocks",
        "Owners whose vectors are in memory.",
        lambda s: s.index_blocks,
        False,
    ),
    (
        "agentmem_index_bytes",
        "Memory of vectors and their graphs.",
        lambda s: s.index_bytes,
        False,
    ),
    (
        "agentmem_index_text_documents",
        "Documents in the text index.",
        lambda s: s.text_documents,
        False,
    ),
    (
        "agentmem_index_text_tail",
        "Documents that are searched in memory until the next commit.",
        lambda s: s.text_tail,
        False,
    ),
)
_PEER: tuple[tuple[str, str, Callable[[PeerSnapshot], float], bool], ...] = (
    ("agentmem_link_connected", "1 when the link stands.", lambda p: p.connected, False),
    ("agentmem_link_sent_bytes", "Bytes sent to the node.", lambda p: p.sent_bytes, True),
    ("agentmem_link_received_bytes", "Bytes from the node.", lambda p: p.received_bytes, True),
    ("agentmem_link_queued_bytes", "Bytes waiting to be sent.", lambda p: p.queued_bytes, False),
)


def node_families(node: NodeSnapshot) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "agentmem_node_info", "1; the labels tell the node.", labels=["node", "version"]
    )
    info.add_metric([node.node_id, node.version], 1)
    yield info
    yield GaugeMetricFamily(
        "agentmem_shard_map_version", "Version of the shard map in use.", node.map_version
    )
    yield GaugeMetricFamily("agentmem_disk_free_bytes", "Free disk.", node.disk_free_bytes)
    yield GaugeMetricFamily(
        "agentmem_disk_is_full", "1 while writes are refused for want of disk.", node.disk_is_full
    )
    yield from _labelled("group", lambda g: g.name, node.groups, _GROUP)
    yield from _labelled("shard", lambda s: s.name, node.shards, _SHARD)
    yield from _labelled("peer", lambda p: p.name, node.peers, _PEER)
    yield from _journal(node)
    yield from _caches(node)
    yield from _work(node)


def _labelled(
    label: str,
    name_of: Callable[[Item], str],
    items: Sequence[Item],
    table: Sequence[tuple[str, str, Callable[[Item], float], bool]],
) -> Iterator[Metric]:
    for name, meaning, value, grows in table:
        kind: Any = CounterMetricFamily if grows else GaugeMetricFamily
        family = kind(name, meaning, labels=[label])
        for item in items:
            family.add_metric([name_of(item)], float(value(item)))
        yield family


def _journal(node: NodeSnapshot) -> Iterator[Metric]:
    journal = node.journal
    yield GaugeMetricFamily("agentmem_journal_bytes", "Size of the journal.", journal.size_bytes)
    yield GaugeMetricFamily("agentmem_journal_segments", "Its files.", journal.segments)
    yield CounterMetricFamily(
        "agentmem_journal_written_bytes", "Bytes written to it.", journal.written_bytes
    )
    yield CounterMetricFamily("agentmem_journal_fsyncs", "Times it was synced.", journal.syncs)
    yield CounterMetricFamily(
        "agentmem_journal_fsync_seconds", "Time spent syncing it.", journal.sync_seconds
    )
    yield GaugeMetricFamily(
        "agentmem_journal_fsync_seconds_max",
        "The slowest sync of the last minute.",
        journal.sync_seconds_max,
    )


def _caches(node: NodeSnapshot) -> Iterator[Metric]:
    ratio = GaugeMetricFamily(
        "agentmem_cache_hit_ratio",
        "Share of look-ups that a cache answered since the start; absent before the first.",
        labels=["cache"],
    )
    hits = CounterMetricFamily("agentmem_cache_hits", "Look-ups answered.", labels=["cache"])
    misses = CounterMetricFamily("agentmem_cache_misses", "And not.", labels=["cache"])
    size = GaugeMetricFamily("agentmem_cache_bytes", "Memory of a cache.", labels=["cache"])
    for cache in node.caches:
        looked_up = cache.hits + cache.misses
        if looked_up:
            ratio.add_metric([cache.name], cache.hits / looked_up)
        hits.add_metric([cache.name], cache.hits)
        misses.add_metric([cache.name], cache.misses)
        size.add_metric([cache.name], cache.size_bytes)
    yield from (ratio, hits, misses, size)


def _work(node: NodeSnapshot) -> Iterator[Metric]:
    embedding = node.embedding
    yield CounterMetricFamily("agentmem_embedding_texts", "Texts embedded.", embedding.texts)
    yield CounterMetricFamily(
        "agentmem_embedding_seconds", "Time the model took.", embedding.seconds
    )
    yield GaugeMetricFamily(
        "agentmem_embedding_queued_texts", "Texts that wait for the model.", embedding.queued_texts
    )
    plugins = CounterMetricFamily(
        "agentmem_plugin_calls", "Calls of plugins.", labels=["plugin", "outcome"]
    )
    for (plugin, outcome), calls in sorted(node.plugin_calls.items()):
        plugins.add_metric([plugin, outcome], calls)
    yield plugins
