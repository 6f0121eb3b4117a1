"""What a node tells of itself when metrics are asked for: plain numbers, taken in one go.

`agentmem_node.service` fills it (no field needs I/O), `agentmem_node.observe.metrics` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RaftRole = Literal["leader", "follower", "candidate"]


@dataclass(slots=True)
class GroupSnapshot:
    """One Raft group of this node. Indexes are log positions."""

    name: str  # "meta", "s03"
    role: RaftRole
    term: int
    has_leader: bool
    commit_index: int
    applied_index: int
    durable_index: int
    queued_writes: int = 0  # proposed here and not yet answered
    elections: int = 0  # that this node stood for since it started


@dataclass(slots=True)
class ShardSnapshot:
    """One shard of this node."""

    name: str
    memories: int
    record_bytes: int  # LMDB pages in use
    vectors: int = 0
    index_blocks: int = 0  # owners whose vectors are in memory
    index_bytes: int = 0  # memory that vectors and their graphs take
    text_documents: int = 0  # in tantivy and its tail
    text_tail: int = 0  # of them, not yet committed


@dataclass(slots=True)
class JournalSnapshot:
    """The write-ahead journal that all groups share."""

    size_bytes: int = 0
    segments: int = 0
    written_bytes: int = 0  # since the start
    syncs: int = 0  # since the start
    sync_seconds: float = 0.0  # spent in them
    sync_seconds_max: float = 0.0  # the slowest of the last minute


@dataclass(slots=True)
class PeerSnapshot:
    """The link to one other node."""

    name: str
    connected: bool
    sent_bytes: int = 0
    received_bytes: int = 0
    queued_bytes: int = 0


@dataclass(slots=True)
class CacheSnapshot:
    """One cache: hits and misses since the start, bytes now."""

    name: str  # "embedding", ...
    hits: int
    misses: int
    size_bytes: int = 0


@dataclass(slots=True)
class EmbeddingSnapshot:
    texts: int = 0  # embedded since the start
    seconds: float = 0.0  # of the model's time
    queued_texts: int = 0


@dataclass(slots=True)
class NodeSnapshot:
    node_id: str
    version: str
    map_version: int = 0
    disk_free_bytes: int = 0
    disk_is_full: bool = False
    groups: list[GroupSnapshot] = field(default_factory=list)
    shards: list[ShardSnapshot] = field(default_factory=list)
    journal: JournalSnapshot = field(default_factory=JournalSnapshot)
    peers: list[PeerSnapshot] = field(default_factory=list)
    caches: list[CacheSnapshot] = field(default_factory=list)
    embedding: EmbeddingSnapshot = field(default_factory=EmbeddingSnapshot)
    # (plugin, outcome) -> calls; empty while no plugin is loaded
    plugin_calls: dict[tuple[str, str], int] = field(default_factory=dict)
