"""Every constant that decides the order of results, with its reason.

All scores are absolute, between 0 and 1, and a function of one memory, its neighbours, the
query and the statistics of the owner (or tenant): nothing is divided by the best score of a
list. That is why an order does not change when the memories are spread over more shards.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentmem_node.model.search import LegName


@dataclass(frozen=True, slots=True)
class RankingDefaults:
    """Constants on plateaus: within wide ranges around each, retrieval quality hardly moves."""

    legs: tuple[tuple[LegName, float], ...] = (("vector", 1.0), ("bm25", 1.0))
    """What a search without `legs` uses, as far as it has a text and a vector."""

    bm25_k1: float = 0.9
    """How late repetitions of a word stop counting. Memories are short: they say little."""

    bm25_b: float = 0.4
    """How much less a long memory's words count. Little: turns differ in length by chance."""

    context_earlier: tuple[float, float] = (0.35, 0.35)
    """What a memory takes from the texts one and two steps before it in its run.

    A turn such as "Yes, last May!" is found by the question that it answers. The weights hold for
    words (BM25F: term frequencies of the neighbours are added) and for vectors (weighted mean)."""

    context_later: tuple[float, float] = (0.2, 0.2)
    """The same from the texts after it. Less: an answer follows its question."""

    length_half: float = 4.0
    """A cosine is trusted by (n + 1) / (n + 1 + length_half), n being the words of the memory.

    Greetings of two words are near to everything. Applies when the query has text."""

    unknown_word_weight: float = 0.5
    """How much a word that no memory has counts among what BM25 could have found.

    It makes a score say whether the memories are about the question at all, so that a threshold
    means the same for any owner."""

    recency_half_life_ms: int = 30 * 86_400_000
    """Age at which the recency leg says 0.5."""

    rrf_k: int = 20
    """Reciprocal rank fusion: weight / (rrf_k + rank) (Cormack et al., SIGIR 2009, with 60; their
    lists were long and many, ours are two)."""

    rank_window: int = 100
    """Ranks are known this far: a memory beyond it in a leg has no rank there (RRF, explain)."""

    rescore_deviations: float = 3.5
    """An int8 cosine is taken to be off by no more than so many standard deviations of its error
    (0.001 at 384 dimensions); memories that may then belong to a page are scored again in float32.

    Whether one of two memories wrongly seems the better by more than both margins: once in a
    million. So the order is that of an exact scan, and pages of any size agree."""

    graph_rows_min: int = 50_000
    """From this many memories on a block is searched by HNSW instead of by a scan of all.

    The scan costs 14 ns a vector and gives every replica the same order. The graph is as stable
    as its recall, takes a core for 15 s per 100,000 vectors, and is faster only from here on."""

    graph_depth: int = 256
    """Candidates that the graph answers; also its ef_search."""
