"""A search, after validation, and its answer: what travels between nodes and into a shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from agentmem_node.model.filters import Filter
from agentmem_node.model.memory import Scope

LegName = Literal["vector", "bm25", "phrase", "fuzzy", "recency", "importance"]
Fusion = Literal["weighted", "rrf"]
Consistency = Literal["linearizable", "session", "eventual"]


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """All that decides the order of results: equal queries give equal orders on any replica."""

    tenant: str
    scope: Scope
    top_k: int
    # Chosen once, by the node that took the request: recency and expiry must agree everywhere.
    now_ms: int
    text: str | None = None
    vector: bytes | None = None  # float32 little-endian, L2-normalised, `dim` values
    filter: Filter | None = None
    legs: tuple[tuple[LegName, float], ...] = ()  # (name, weight); empty: the defaults
    fusion: Fusion = "weighted"
    threshold: float | None = None
    explain: bool = False
    after: tuple[float, bytes] | None = None  # cursor: (score, id) of the last result seen
    language: str = "en"


@dataclass(slots=True)
class LegHit:
    rank: int  # 1-based, over all shards
    score: float
    weight: float
    contribution: float


@dataclass(slots=True)
class Hit:
    id: bytes  # 16
    score: float
    record: bytes  # the stored JSON object, to be spliced
    legs: dict[str, LegHit] = field(default_factory=dict)  # with explain


@dataclass(slots=True)
class SearchAnswer:
    hits: list[Hit]
    partial: list[str]  # shards that did not answer in time
    tokens: dict[str, int]  # shard -> applied index
    next_after: tuple[float, bytes] | None = None
    took_ms: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
