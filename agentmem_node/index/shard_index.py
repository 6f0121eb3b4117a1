"""Search within one shard: blocks by owner, made when first asked for, kept current by `apply`.

A search over one shard is `search_local`. A search over several runs in two phases, so that every
shard scores with the statistics of all: `text_stats` on each, `merge_stats`, `legs` on each, and
`fusion.fuse` where the request came in. Both take the same path through the same functions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np

from agentmem_node.index import scoring, selection
from agentmem_node.index.analysis import analyzer, query_keys
from agentmem_node.index.block import Block
from agentmem_node.index.columns import Bools, Floats
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.fusion import Fused, LegResults, fuse
from agentmem_node.index.masks import candidates
from agentmem_node.index.scoring import TextStats
from agentmem_node.index.selection import Scored
from agentmem_node.index.source import Change, IndexDoc, Removed, Source
from agentmem_node.index.vectors import QueryVector
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import LegName, SearchQuery

_BLOCKS_BYTES_MAX: Final = 1 << 30

BlockKey = tuple[str, str | None, str]  # tenant, owner (None: the whole tenant), language


def owner_of_query(scope: Scope) -> str | None:
    """The owner that holds every match, or None: the search goes to all shards.

    Only a user id says so: a memory of user ana and agent planner is owned by ana, and a search
    for the agent alone must find it.
    """
    return None if scope.user_id is None else f"user:{scope.user_id}"


def active_legs(query: SearchQuery, defaults: RankingDefaults) -> list[tuple[LegName, float]]:
    """The legs of a query that can say anything, with their weights: the same on every shard."""
    legs = []
    for name, weight in query.legs or defaults.legs:
        needs_text = name in ("bm25", "phrase", "fuzzy")
        if weight <= 0 or (needs_text and not query.text) or (name == "vector" and not query.vector):
            continue
        legs.append((name, weight))
    return legs


class ShardIndex:
    """One shard's index. Not thread-safe: it belongs to the thread that applies and searches."""

    def __init__(
        self,
        source: Source,
        *,
        dim: int,
        defaults: RankingDefaults | None = None,
        blocks_bytes_max: int = _BLOCKS_BYTES_MAX,
    ) -> None:
        self.defaults = defaults or RankingDefaults()
        self._source = source
        self._dim = dim
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        self._keys_of_tenant: dict[str, set[BlockKey]] = {}
        self._bytes_max = blocks_bytes_max

    # -- changes ------------------------------------------------------------------------

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in what was just applied to the store, in order. Blocks not in memory need nothing."""
        if not self._blocks:
            return
        by_owner: dict[tuple[str, str], list[Change]] = {}
        for change in changes:
            owner = change.owner if isinstance(change, Removed) else change.memory.scope.owner
            by_owner.setdefault((change.tenant, owner), []).append(change)
        for key in [k for t in {tenant for tenant, _ in by_owner} for k in self._keys_of_tenant.get(t, ())]:
            tenant, owner, _ = key
            if owner is None:
                mine = [c for c in changes if c.tenant == tenant]
            else:
                mine = by_owner.get((tenant, owner), [])
            if mine:
                _apply(self._blocks[key], mine)

    # -- searching ----------------------------------------------------------------------

    def search_local(self, query: SearchQuery) -> Fused:
        """The whole search, when this shard holds every match. All records are filled in."""
        block = self._block(query)
        keys = query_keys(query.text, query.language)
        stats = scoring.block_stats(block, keys) if keys else None
        return self._fuse_alone(query, self._legs(block, query, keys, stats))

    def text_stats(self, query: SearchQuery) -> TextStats:
        """Phase 1 of a search over several shards."""
        keys = query_keys(query.text, query.language)
        return scoring.block_stats(self._block(query), keys)

    def legs(self, query: SearchQuery, stats: TextStats) -> LegResults:
        """Phase 2: this shard's candidates, scored with the merged statistics."""
        keys = query_keys(query.text, query.language)
        return self._legs(self._block(query), query, keys, stats if keys else None)

    def records(self, docs: Sequence[int]) -> list[bytes]:
        """Phase 3, for what `fuse` found missing."""
        return self._source.records(docs)

    def _fuse_alone(self, query: SearchQuery, results: LegResults) -> Fused:
        fused = fuse(query, active_legs(query, self.defaults), [results], self.defaults)
        if fused.missing:
            records = self._source.records([doc for _, _, doc in fused.missing])
            for (position, _, _), record in zip(fused.missing, records, strict=True):
                fused.hits[position].record = record
            fused.missing = []
        return fused

    def _legs(
        self, block: Block, query: SearchQuery, keys: Sequence[int], stats: TextStats | None
    ) -> LegResults:
        legs = active_legs(query, self.defaults)
        if not legs or not block.columns.live:
            return LegResults([], [[] for _ in legs])
        scored = self._scored(block, query, legs, keys, stats)
        read = self._source.vectors
        ranked: list[list[tuple[float, bytes, int]]] = []
        if query.explain or query.fusion == "rrf":
            ranked = selection.ranked_lists(scored, self.defaults, read)
        if query.fusion == "rrf":
            found = selection.ranked_candidates(scored, ranked, read)
        else:
            found = selection.weighted_page(scored, query, self.defaults, read)
            page = found[: query.top_k]
            for candidate, record in zip(
                page, self._source.records([c.doc for c in page]), strict=True
            ):
                candidate.record = record
        return LegResults(found, selection.without_rows(ranked))

    def _scored(
        self,
        block: Block,
        query: SearchQuery,
        legs: Sequence[tuple[LegName, float]],
        keys: Sequence[int],
        stats: TextStats | None,
    ) -> Scored:
        owner = owner_of_query(query.scope)
        mask = candidates(
            block, query.scope, owner, query.filter, query.now_ms, self._source.memory
        )
        n = block.columns.n
        vector = None
        scores: list[Floats] = []
        members: list[Bools | None] = []
        for name, _ in legs:
            known: Bools | None = None
            if name == "vector":
                assert query.vector is not None
                vector = QueryVector(query.vector, block.vectors.scale)
                leg = scoring.vector_scores(block, vector, with_text=bool(query.text))
                if block.columns.without_vector:
                    known = block.columns.has_vector[:n]
            elif name == "bm25":
                found = None
                if stats is not None:
                    found = scoring.bm25_scores(block, keys, stats, self.defaults)
                leg = np.zeros(n) if found is None else found
                known = leg > 0
            elif name == "recency":
                leg = scoring.recency_scores(block, query.now_ms, self.defaults)
            elif name == "importance":
                leg = scoring.importance_scores(block)
            else:
                leg = np.zeros(n)
                known = leg > 0
            scores.append(leg)
            members.append(known)
        return Scored(block, legs, scores, members, mask, vector, bool(query.text))

    # -- blocks -------------------------------------------------------------------------

    def _block(self, query: SearchQuery) -> Block:
        key = (query.tenant, owner_of_query(query.scope), query.language)
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
            return block
        tenant, owner, language = key
        block = Block.build(
            self._source.scan(tenant, owner),
            self._source.count(tenant, owner),
            self._dim,
            analyzer(language),
            self.defaults,
        )
        self._blocks[key] = block
        self._keys_of_tenant.setdefault(tenant, set()).add(key)
        self._evict()
        return block

    def _evict(self) -> None:
        """Forget the blocks that were not used for longest, never the newest."""
        total = sum(block.bytes_used() for block in self._blocks.values())
        while total > self._bytes_max and len(self._blocks) > 1:
            key, block = self._blocks.popitem(last=False)
            self._keys_of_tenant[key[0]].discard(key)
            total -= block.bytes_used()


def _apply(block: Block, changes: Sequence[Change]) -> None:
    puts: list[IndexDoc] = []
    for change in changes:
        if isinstance(change, IndexDoc):
            puts.append(change)
            continue
        if puts:
            block.put(puts)
            puts = []
        block.remove(change.doc)
    if puts:
        block.put(puts)
