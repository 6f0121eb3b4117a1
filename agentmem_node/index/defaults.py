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
    """Constants stand on plateaus: within wide ranges around each, retrieval quality hardly moves."""

    legs: tuple[tuple[LegName, float], ...] = (("vector", 1.0), ("bm25", 1.0))
    """What a search without `legs` uses, where it applies (no text, no BM25; no vector, no vector leg)."""

    bm25_k1: float = 0.9
    """How soon more repetitions of a word stop counting. Memories are short: repetition says little."""

    bm25_b: float = 0.4
    """How much a long memory's words count less. Low: conversation turns differ in length for no reason."""

    context_weights: tuple[float, float] = (0.3, 0.3)
    """What a memory takes from the texts one and two steps away in its run, before and after it.

    A turn such as "Yes, last May!" is found by the question that it answers. The weights hold for
    words (BM25F: term frequencies of the neighbours are added) and for vectors (weighted mean)."""

    length_half: float = 4.0
    """A text of this many words has half of its cosine taken at face value: `n / (n + length_half)`.

    Greetings of two words are near to everything. Applies when the query has text."""

    recency_half_life_ms: int = 30 * 86_400_000
    """Age at which the recency leg says 0.5."""

    rrf_k: int = 60
    """Reciprocal rank fusion: weight / (rrf_k + rank), as in Cormack et al., SIGIR 2009."""

    rank_window: int = 200
    """Ranks are known this far: a memory beyond it in a leg has no rank there (RRF, explain)."""

    rescore_steps: float = 3.0
    """Memories whose int8 score is within this many quantisation steps of a page's last place are
    scored again in float32.

    A step is 1/300 at 384 dimensions, where the int8 error of a cosine has a standard deviation
    of 0.001 to 0.0015 (measured): the order is that of an exact scan, and pages of any size agree."""

    graph_rows_min: int = 16_384
    """From this many vectors on a block is searched by HNSW instead of by a scan of all."""

    graph_depth: int = 256
    """Candidates that the graph answers; also its ef_search. The scan has no such limit."""
