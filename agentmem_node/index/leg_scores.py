"""All legs of one search over one block: which rows may be ranked, and each leg's score of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmem_node.index import scoring
from agentmem_node.index.analysis import QueryTerms, analyzer
from agentmem_node.index.block import Block
from agentmem_node.index.columns import Bools, Floats, Ints
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.derived import ReadMemory
from agentmem_node.index.graph import BlockGraph, Graph, GraphBuilder
from agentmem_node.index.masks import allowed_rows
from agentmem_node.index.postings import Found
from agentmem_node.index.scoring import TextStats
from agentmem_node.index.selection import Scored, best_rows
from agentmem_node.index.text_legs import TextQuery, fuzzy_scores, phrase_scores
from agentmem_node.index.text_space import TextSpaces
from agentmem_node.index.vectors import QueryVector
from agentmem_node.model.search import LegName, SearchQuery


class LegScorer:
    """What scoring needs besides the block and the query."""

    def __init__(
        self,
        defaults: RankingDefaults,
        texts: TextSpaces,
        graphs: GraphBuilder,
        read: ReadMemory,
    ) -> None:
        self._defaults = defaults
        self._texts = texts
        self._graphs = graphs
        self._read = read

    def score(
        self,
        block: Block,
        query: SearchQuery,
        legs: Sequence[tuple[LegName, float]],
        owner: str | None,
        terms: QueryTerms,
        found: Found,
        stats: TextStats,
    ) -> Scored:
        """`found`: where the terms are in this block; `stats`: of all that is searched."""
        mask = allowed_rows(block, query.scope, owner, query.filter, query.now_ms, self._read)
        n = block.columns.n
        scores: list[Floats] = []
        members: list[Bools | None] = []
        vector_at = -1
        for position, (name, _) in enumerate(legs):
            known: Bools | None = None
            if name == "vector":
                vector_at = position
                leg = np.zeros(0)  # last: what the others find best may decide where to look
            elif name == "bm25":
                sums = None
                if len(terms.keys) and stats.memories:
                    sums = scoring.bm25_scores(block, terms, found, stats, self._defaults)
                leg = np.zeros(n) if sums is None else sums
                known = leg > 0
            elif name == "recency":
                leg = scoring.recency_scores(block, query.now_ms, self._defaults)
            elif name == "importance":
                leg = scoring.importance_scores(block)
            else:
                text = TextQuery.of(query.text or "", analyzer(query.language))
                self._texts.fill(block)
                score = phrase_scores if name == "phrase" else fuzzy_scores
                leg = score(block, text, self._texts.engine, mask, self._read)
                known = leg > 0
            scores.append(leg)
            members.append(known)
        scored = Scored(block, legs, scores, members, mask, None, None, bool(query.text))
        if vector_at >= 0:
            self._score_vectors(scored, vector_at, query.vector or b"")
        return scored

    def _score_vectors(self, scored: Scored, position: int, vector: bytes) -> None:
        block = scored.block
        n = block.columns.n
        scored.vector = QueryVector(vector, block.vectors.scale)
        graph = self._graph(block, scored.mask) if n > self._defaults.graph_rows_min else None
        if graph is None:
            scored.cosines = block.vectors.scan(scored.vector, n)
        else:
            self._look_around(scored, graph, scored.vector)
        assert scored.cosines is not None
        scored.scores[position] = scoring.vector_scores(
            block, scored.cosines, with_text=scored.with_text
        )
        if block.columns.without_vector:
            scored.members[position] = block.columns.has_vector[:n]

    def _graph(self, block: Block, mask: Bools | None) -> Graph | None:
        """The block's graph, when there is one and it serves: of a graph's answers a strict
        filter would leave too few."""
        if block.graph is None:
            block.graph = BlockGraph(self._graphs)
        graph = block.graph.current(block.vectors, block.columns.n)
        if mask is not None and 2 * int(np.count_nonzero(mask)) < len(mask):
            return None
        return graph

    def _look_around(self, scored: Scored, graph: Graph, vector: QueryVector) -> None:
        """Cosines of the memories that the graph or another leg finds best, and of those around
        them in their runs. Only these are ranked; the others are taken to be at the floor where
        they lend to one that is."""
        block = scored.block
        n = block.columns.n
        depth = self._defaults.graph_depth
        near = graph.near(vector, block.vectors, n, depth)
        looked_at = [near.rows]
        for (name, _), leg in zip(scored.legs, scored.scores, strict=True):
            if name != "vector":
                looked_at.append(best_rows(leg, scored.mask, depth))
        rows: Ints = np.concatenate(looked_at)
        if scored.with_text and block.links.has_links:
            before, after = block.links.before, block.links.after
            left, right = before[rows], after[rows]
            rows = np.concatenate([rows, left, right, before[left], after[right]])
        rows = np.unique(rows)
        scored.cosines = np.full(n, near.floor)
        scored.cosines[~block.columns.has_vector[:n]] = 0.0
        scored.cosines[rows] = block.vectors.gather(vector, rows)
        within: Bools = np.zeros(n, dtype=np.bool_)
        within[rows] = True
        scored.mask = within if scored.mask is None else scored.mask & within
