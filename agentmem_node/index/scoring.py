"""One leg, one number between 0 and 1 for every row of a block.

Each is a function of the memory, its neighbours in the run, the query and the statistics given,
in this order of operations whatever the layout of the block: equal inputs, equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from agentmem_node.index.analysis import QueryTerms
from agentmem_node.index.block import Block
from agentmem_node.index.columns import Floats, Ints
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.postings import Found, Matches


@dataclass(frozen=True, slots=True)
class TextStats:
    """What BM25 must know of all memories searched: of an owner, or of a tenant over its shards."""

    memories: int
    terms_total: int
    frequencies: tuple[int, ...]  # of the query's terms, in the order of `query_keys`

    def to_wire(self) -> list[Any]:
        return [self.memories, self.terms_total, list(self.frequencies)]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TextStats:
        return cls(wire[0], wire[1], tuple(wire[2]))


def merge_stats(parts: Sequence[TextStats]) -> TextStats:
    """The statistics of several shards together."""
    return TextStats(
        sum(p.memories for p in parts),
        sum(p.terms_total for p in parts),
        tuple(map(sum, zip(*(p.frequencies for p in parts), strict=True))),
    )


def block_stats(block: Block, found: Found) -> TextStats:
    return TextStats(block.columns.live, block.terms_total, tuple(found.frequencies))


def bm25_scores(
    block: Block, terms: QueryTerms, found: Found, stats: TextStats, defaults: RankingDefaults
) -> Floats | None:
    """BM25 over a memory's own words and those lent by its neighbours (BM25F), divided by the sum
    of the terms' weights, which it can never reach; None when no term is known.

    sum(idf * tf / (tf + k1 * (1 - b + b * length / average))) / sum(idf)
    with idf = ln(1 + (N - df + .5) / (df + .5)), as Lucene and tantivy have it. A word that no
    memory has adds a part of its weight to the divisor; an unknown date adds nothing.
    """
    total = stats.memories
    weights = []
    weight_sum = 0.0
    for position, df in enumerate(stats.frequencies):
        weight = math.log(1.0 + (total - df + 0.5) / (df + 0.5))
        if df:
            weight_sum += weight
        else:
            if position < terms.words:
                weight_sum += weight * defaults.unknown_word_weight
            weight = 0.0
        weights.append(weight)
    matches = block.postings.matches(found)
    if not len(matches.row):
        return None
    n = block.columns.n
    if block.links.has_links:
        matches = _lend(block, matches, len(terms.keys), defaults)
    average = stats.terms_total / total or 1.0
    k1, b = defaults.bm25_k1, defaults.bm25_b
    length = block.context().length
    if length is None:
        gain = block.columns.length.take(matches.row).astype(np.float64)
    else:
        gain = length.take(matches.row)
    gain *= k1 * b / average
    gain += k1 * (1.0 - b)
    gain += matches.occurrences
    np.divide(matches.occurrences, gain, out=gain)
    gain *= np.array([w / weight_sum for w in weights])[matches.term]
    scores: Floats = _sums(matches.row, gain, n)
    return scores


def _lend(block: Block, matches: Matches, terms: int, defaults: RankingDefaults) -> Matches:
    """Counts with those of neighbours added: every entry is dealt out to the rows around it, to
    the later ones as something earlier, to the earlier ones as something later."""
    n = block.columns.n
    before, after = block.links.before, block.links.after
    row = matches.row
    left, right = before.take(row), after.take(row)
    cells: Ints = np.concatenate([row, right, after.take(right), left, before.take(left)])
    by_distance = cells.reshape(5, -1)
    by_distance += matches.term * n
    weights = np.array([1.0, *defaults.context_earlier, *defaults.context_later])
    lent = np.multiply.outer(weights, matches.occurrences).ravel()
    sums: Floats
    if terms * n <= 16 * len(cells) + 65_536:
        sums = _sums(cells, lent, terms * n)
        # Of booleans, which numpy searches ten times faster than floats.
        held: Ints = (sums > 0).nonzero()[0]
        sums = sums[held]
    else:
        held, inverse = np.unique(cells, return_inverse=True)
        sums = _sums(inverse, lent, len(held))
    # Cells are sorted, so that a term's are in one piece: cheaper than dividing each by n.
    ends = held.searchsorted(np.arange(1, terms + 1) * n)
    term = np.arange(terms).repeat(np.diff(ends, prepend=0))
    held -= term * n
    # What was lent to "no memory" is in row 0, which nobody ranks.
    return Matches(term, held, sums)


def vector_scores(block: Block, cosines: Floats, *, with_text: bool) -> Floats:
    """Cosines, floored at 0; with a text query also trust in length and neighbours.

    A bare vector asks for the nearest vectors: then nothing else counts.
    """
    scores: Floats = np.maximum(cosines, 0.0)
    if not with_text:
        return scores
    context = block.context()
    scores *= context.trust
    if context.share is not None:
        scores = block.with_neighbours(scores)
        scores *= context.share
    return scores


def exact_correction(
    block: Block, rows: Ints, approximate: Floats, exact: Floats, *, with_text: bool
) -> Floats:
    """What to add to `vector_scores` of `rows` once their float32 cosines are known."""
    change: Floats = np.maximum(exact, 0.0)
    change -= np.maximum(approximate, 0.0)
    if with_text:
        change *= block.context().exposure[rows]
    return change


def recency_scores(block: Block, now_ms: int, defaults: RankingDefaults) -> Floats:
    """1 for a memory of this moment, halved with every half-life."""
    age = np.maximum(now_ms - block.columns.created_ms[: block.columns.n], 0)
    return np.exp2(age / -float(defaults.recency_half_life_ms))


def importance_scores(block: Block) -> Floats:
    column = block.columns.coded["importance"]
    values = np.array([value or 0.0 for value in column.values])
    scores: Floats = values[column.codes[: block.columns.n]]
    return scores


def _sums(at: Ints, values: Floats, size: int) -> Floats:
    """The sum of the values at each position: added in the order given."""
    sums: Any = np.bincount(at, values, size)
    return cast("Floats", sums)
