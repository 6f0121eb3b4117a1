"""Search within one shard: blocks by owner, made when first asked for, kept current by `apply`.

A search over one shard is `search_local`. A search over several runs in two phases, so that every
shard scores with the statistics of all: `text_stats` on each, `merge_stats`, `legs` on each, and
`fusion.fuse` where the request came in. Both take the same path through the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from agentmem_node.index import scoring, selection
from agentmem_node.index.analysis import QueryTerms, query_terms
from agentmem_node.index.block import Block
from agentmem_node.index.blocks import BlockBudget, BlockKey, Blocks
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.fusion import Fused, LegResults, fuse
from agentmem_node.index.graph import GraphBuilder
from agentmem_node.index.leg_scores import LegScorer
from agentmem_node.index.postings import Found
from agentmem_node.index.scoring import TextStats
from agentmem_node.index.source import Change, Source
from agentmem_node.index.text_engine import TextEngine
from agentmem_node.index.text_space import TextSpaces
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import Hit, LegName, SearchQuery

# Records of which a filter may need to read all within one search.
_READ_AT_ONCE: Final = 256
_NO_TERMS: Final = QueryTerms(np.zeros(0, dtype=np.uint64), 0)


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
        if (
            weight <= 0
            or (needs_text and not query.text)
            or (name == "vector" and not query.vector)
        ):
            continue
        legs.append((name, weight))
    return legs


class ShardIndex:
    """One shard's index. Not thread-safe: it belongs to the thread that applies and searches."""

    def __init__(
        self,
        source: Source,
        *,
        shard_id: str = "",
        dim: int | None = None,
        text_engine: TextEngine | None = None,
        graphs: GraphBuilder | None = None,
        defaults: RankingDefaults | None = None,
        budget: BlockBudget | None = None,
    ) -> None:
        """`text_engine`, `graphs` and `budget` are shared by the shards of a node."""
        self.shard_id = shard_id
        self.defaults = defaults or RankingDefaults()
        self._source = source
        self._texts = TextSpaces(text_engine, source.memory)
        self._graphs = graphs or GraphBuilder()
        self._scorer = LegScorer(self.defaults, self._texts, self._graphs, source.memory)
        self._blocks = Blocks(
            source,
            source.dim if dim is None else dim,
            self.defaults,
            budget or BlockBudget(),
            self._forget,
        )

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in what was just applied to the store, in order. Costs nothing for other blocks."""
        self._blocks.apply(changes)

    def needs_build(self, query: SearchQuery) -> bool:
        """Whether a search would first spend noticeable time on reading memories in."""
        key = _key(query)
        if self._blocks.needs_build(key):
            return True
        if query.filter is None and not query.legs:
            return False  # most searches
        block = self._blocks.get(key)
        if self._seeks_text(query) and self._texts.needs_fill(block):
            return True
        return block.columns.live > _READ_AT_ONCE and bool(block.derived.needed(query.filter))

    def build_steps(self, query: SearchQuery) -> Iterator[None]:
        """Do that in steps of a few milliseconds; entries may be applied between them."""
        return self._steps(query) if self.needs_build(query) else iter(())

    def _steps(self, query: SearchQuery) -> Iterator[None]:
        key = _key(query)
        yield from self._blocks.build_steps(key)
        if self._seeks_text(query):
            yield from self._texts.fill_steps(self._blocks.get(key))
        derived = self._blocks.get(key).derived
        for column in derived.needed(query.filter):
            yield from derived.fill_steps(column, self._source.memory)

    def _seeks_text(self, query: SearchQuery) -> bool:
        return any(name in ("phrase", "fuzzy") for name, _ in query.legs or self.defaults.legs)

    def stats(self) -> dict[str, int]:
        """Figures for operators; those of the text engine are the node's."""
        engine = self._texts.engine
        return {
            "blocks": len(self._blocks),
            "bytes": self._blocks.bytes_used,
            "blocks_forgotten": self._blocks.forgotten,
            "text_documents": 0 if engine is None else engine.documents,
            "text_tail": 0 if engine is None else engine.pending,
        }

    def close(self) -> None:
        """End what works in the background. There is nothing to flush: all of it is derived."""
        self._blocks.close()
        self._graphs.close()

    def _forget(self, block: Block) -> None:
        self._texts.drop(block)
        if block.graph is not None:
            block.graph.forget()

    # -- searching ----------------------------------------------------------------------

    def search_local(self, query: SearchQuery) -> Fused:
        """The whole search, when this shard holds every match. All records are filled in."""
        block = self._blocks.get(_key(query))
        terms = _terms(query)
        found = block.postings.find(terms.keys)
        stats = scoring.block_stats(block, found)
        legs = active_legs(query, self.defaults)
        if query.fusion == "weighted" and not query.explain and legs and block.columns.live:
            # The page of the only shard is the answer: `fuse` would find nothing to do.
            scored = self._scorer.score(
                block, query, legs, owner_of_query(query.scope), terms, found, stats
            )
            page = selection.weighted_page(scored, query, self.defaults, self._source.vectors)
            records = self._source.records(page.docs[: query.top_k])
            hits = list(map(Hit, page.ids, page.scores, records))
            return Fused(hits, (hits[-1].score, hits[-1].id) if len(page.ids) > len(hits) else None)
        results = self._results(block, query, legs, terms, found, stats)
        fused = fuse(query, legs, [results], self.defaults)
        if fused.missing:
            records = self._source.records([doc for _, _, doc in fused.missing])
            for (position, _, _), record in zip(fused.missing, records, strict=True):
                fused.hits[position].record = record
            fused.missing = []
        return fused

    def text_stats(self, query: SearchQuery) -> TextStats:
        """Phase 1 of a search over several shards."""
        block = self._blocks.get(_key(query))
        return scoring.block_stats(block, block.postings.find(_terms(query).keys))

    def legs(self, query: SearchQuery, stats: TextStats) -> LegResults:
        """Phase 2: this shard's candidates, scored with the merged statistics."""
        terms = _terms(query)
        block = self._blocks.get(_key(query))
        found = block.postings.find(terms.keys)
        legs = active_legs(query, self.defaults)
        return self._results(block, query, legs, terms, found, stats)

    def records(self, docs: Sequence[int]) -> list[bytes]:
        """Phase 3, for what `fuse` found missing; empty for what was deleted since."""
        try:
            return self._source.records(docs)
        except KeyError:
            return [self._record(doc) for doc in docs]

    def _record(self, doc: int) -> bytes:
        try:
            return self._source.records([doc])[0]
        except KeyError:
            return b""

    def _results(
        self,
        block: Block,
        query: SearchQuery,
        legs: Sequence[tuple[LegName, float]],
        terms: QueryTerms,
        found: Found,
        stats: TextStats,
    ) -> LegResults:
        if not legs or not block.columns.live:
            return LegResults([], [[] for _ in legs])
        scored = self._scorer.score(
            block, query, legs, owner_of_query(query.scope), terms, found, stats
        )
        read = self._source.vectors
        ranked: list[selection.RankedRows] = []
        if query.explain or query.fusion == "rrf":
            ranked = selection.ranked_lists(scored, self.defaults, read)
        if query.fusion == "rrf":
            candidates = selection.ranked_candidates(scored, ranked, read, explain=query.explain)
        else:
            page = selection.weighted_page(scored, query, self.defaults, read)
            candidates = page.candidates()
            records = self._source.records(page.docs[: query.top_k])
            for candidate, record in zip(candidates, records, strict=False):
                candidate.record = record
        return LegResults(candidates, [[(s, key) for s, key, _ in leg] for leg in ranked])


def _key(query: SearchQuery) -> BlockKey:
    return (query.tenant, owner_of_query(query.scope), query.language)


def _terms(query: SearchQuery) -> QueryTerms:
    return query_terms(query.text, query.language) if query.text else _NO_TERMS
