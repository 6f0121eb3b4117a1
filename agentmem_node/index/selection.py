"""From dense scores of a block to the few memories that can be on the page.

The int8 scan is off by a thousandth or so; whatever comes within the margin of the page's last
place is scored again in float32, so that the page is that of an exact search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agentmem_node.index import scoring
from agentmem_node.index.block import Block
from agentmem_node.index.columns import Bools, Floats, Ints
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.fusion import Candidate, on_grid, weighted_scores
from agentmem_node.index.vectors import QueryVector, exact_cosines
from agentmem_node.model.search import LegName, SearchQuery

_GROUPS_EACH: Final = 16
# Rows scored again in float32 for one page, besides two for each place on it: 1 us each.
_RESCORED_MAX: Final = 1_024
# Of sums made in another order; far below the grid of scores.
_ROUNDING: Final = 1e-9

RankedRows = list[tuple[float, bytes, int]]
"""(score, id, row), best first."""

ReadVectors = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(slots=True)
class Scored:
    """The legs of one search over one block. `members`: rows that a leg knows; None: any row."""

    block: Block
    legs: Sequence[tuple[LegName, float]]
    scores: list[Floats]  # a leg
    members: list[Bools | None]  # a leg
    mask: Bools | None  # rows that passed scope, filters and expiry; None: all but row 0
    vector: QueryVector | None
    cosines: Floats | None  # of every row, by int8
    with_text: bool
    exact: Floats | None = None  # scores of the vector leg corrected by float32,
    is_exact: Bools | None = None  # of the rows for which that was done


@dataclass(frozen=True, slots=True)
class Page:
    """Memories in their final order, one more than a page holds when there are more."""

    ids: list[bytes]
    docs: list[int]
    scores: list[float]
    legs: list[list[float]]  # of each leg, the scores

    def candidates(self) -> list[Candidate]:
        by_memory = zip(*self.legs, strict=True)
        rows = zip(self.ids, self.docs, self.scores, by_memory, strict=True)
        return [Candidate(*row) for row in rows]


_EMPTY: Final = Page([], [], [], [])


def weighted_page(
    scored: Scored, query: SearchQuery, defaults: RankingDefaults, read: ReadVectors
) -> Page:
    """The best top_k + 1 after the cursor, by weighted score."""
    weights = [weight for _, weight in scored.legs]
    total, spread = _totals(scored, weights, defaults)
    _exclude(total, scored, _any_member(scored))
    at_most = total + spread
    at_least = total - spread
    pool = at_least
    if query.after is not None:
        # Of what certainly comes after the cursor, the best decide how deep to look.
        pool = np.where(at_most < query.after[0] - _ROUNDING, at_least, -1.0)
    least = max(_nth_largest(pool, query.top_k + 1) - _ROUNDING, 0.0)
    if query.threshold is not None:
        least = max(least, query.threshold - _ROUNDING)
    chosen = at_most >= least
    if query.after is not None:
        chosen &= at_least <= query.after[0] + _ROUNDING
    rows: Ints = chosen.nonzero()[0]
    if not len(rows):
        return _EMPTY
    if len(rows) > _RESCORED_MAX + 2 * query.top_k:
        rows = _cut(scored, rows, total[rows], query.after, _RESCORED_MAX + 2 * query.top_k)
    legs = [_refined(scored, leg, rows, read) for leg in range(len(scored.legs))]
    final = weighted_scores(legs, weights)
    columns = scored.block.columns
    pairs = columns.ids[rows]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -final))
    if query.threshold is not None:
        order = order[final[order] >= query.threshold]
    if query.after is None:
        order = order[: query.top_k + 1]
    ids = _ids(pairs[order])
    scores = final[order].tolist()
    if query.after is not None:
        last = (-query.after[0], query.after[1])
        skip = sum((-score, key) <= last for score, key in zip(scores, ids, strict=True))
        end = skip + query.top_k + 1
        order, ids, scores = order[skip:end], ids[skip:end], scores[skip:end]
    docs = columns.docs(rows[order])
    return Page(ids, docs, scores, [leg[order].tolist() for leg in legs])


def _cut(
    scored: Scored, rows: Ints, about: Floats, after: tuple[float, bytes] | None, most: int
) -> Ints:
    """The likeliest `most` of rows that cannot be told apart by int8: hundreds of equal memories.

    Equal ones come by id, and those that the pages before have shown last.
    """
    pairs = scored.block.columns.ids[rows]
    high, low = pairs[:, 0], pairs[:, 1]
    keys = [low, high, -about]
    if after is not None:
        last_high = np.uint64(int.from_bytes(after[1][:8], "big"))
        last_low = np.uint64(int.from_bytes(after[1][8:], "big"))
        keys.append((high < last_high) | ((high == last_high) & (low <= last_low)))
    return np.sort(rows[np.lexsort(keys)[:most]])


def _totals(
    scored: Scored, weights: Sequence[float], defaults: RankingDefaults
) -> tuple[Floats, npt.NDArray[np.floating] | float]:
    """Weighted scores of all rows by int8, and how far from exact each may be."""
    weight_sum = sum(weights)
    total: Floats = scored.scores[0] * (weights[0] / weight_sum)
    for scores, weight in zip(scored.scores[1:], weights[1:], strict=True):
        total += scores * (weight / weight_sum)
    for name, weight in scored.legs:
        if name == "vector":
            return total, _spread(scored, weight / weight_sum, defaults)
    return total, 0.0


def _spread(
    scored: Scored, weight: float, defaults: RankingDefaults
) -> npt.NDArray[np.floating] | float:
    assert scored.vector is not None
    error = defaults.rescore_deviations * scored.vector.deviation * weight
    return scored.block.context().exposure * error if scored.with_text else error


def ranked_lists(scored: Scored, defaults: RankingDefaults, read: ReadVectors) -> list[RankedRows]:
    """For each leg, its best (score, id, row), down to the rank window."""
    lists = []
    for number, (name, _) in enumerate(scored.legs):
        scores = scored.scores[number].copy()
        _exclude(scores, scored, scored.members[number])
        spread = _spread(scored, 1.0, defaults) if name == "vector" else 0.0
        least = _nth_largest(scores - spread, defaults.rank_window) - _ROUNDING
        rows: Ints = (scores + spread >= max(least, 0.0)).nonzero()[0]
        if len(rows) > _RESCORED_MAX:
            rows = _cut(scored, rows, scores[rows], None, _RESCORED_MAX)
        exact = on_grid(_refined(scored, number, rows, read))
        columns = scored.block.columns
        pairs = columns.ids[rows]
        order = np.lexsort((pairs[:, 1], pairs[:, 0], -exact))
        order = order[: defaults.rank_window]
        rows = rows[order]
        lists.append(
            list(zip(exact[order].tolist(), _ids(pairs[order]), rows.tolist(), strict=True))
        )
    return lists


def ranked_candidates(
    scored: Scored, lists: Sequence[RankedRows], read: ReadVectors, *, explain: bool
) -> list[Candidate]:
    """Every memory in one of the lists; to explain, with its score in all legs."""
    ids = {row: key for entries in lists for _, key, row in entries}
    rows: Ints = np.array(sorted(ids), dtype=np.int64)
    docs = scored.block.columns.docs(rows)
    if not explain:
        return [
            Candidate(ids[row], doc, 0.0, ()) for row, doc in zip(rows.tolist(), docs, strict=True)
        ]
    legs = [_refined(scored, leg, rows, read).tolist() for leg in range(len(scored.legs))]
    return [
        Candidate(ids[row], doc, 0.0, scores)
        for row, doc, scores in zip(rows.tolist(), docs, zip(*legs, strict=True), strict=True)
    ]


def _refined(scored: Scored, leg: int, rows: Ints, read: ReadVectors) -> Floats:
    """A leg's scores of some rows; the vector leg's corrected by the float32 originals."""
    scores = scored.scores[leg]
    vector, cosines = scored.vector, scored.cosines
    if scored.legs[leg][0] != "vector" or vector is None or cosines is None:
        return scores[rows]
    todo = rows
    if scored.is_exact is None or scored.exact is None:
        scored.exact = np.empty(len(scores))
        scored.is_exact = np.zeros(len(scores), dtype=np.bool_)
    else:
        todo = rows[~scored.is_exact[rows]]
    if len(todo):
        block = scored.block
        exact = exact_cosines(read(block.columns.doc_of(todo)), vector)
        values: Floats = scores[todo]
        values += scoring.exact_correction(
            block, todo, cosines[todo], exact, with_text=scored.with_text
        )
        np.minimum(values, 1.0, out=values)
        np.maximum(values, 0.0, out=values)
        scored.exact[todo] = values
        scored.is_exact[todo] = True
        if len(todo) == len(rows):
            return values
    return scored.exact[rows]


def _ids(pairs: npt.NDArray[np.uint64]) -> list[bytes]:
    """Ids of 16 bytes."""
    packed = pairs.tobytes()
    return [packed[i : i + 16] for i in range(0, len(packed), 16)]


def _any_member(scored: Scored) -> Bools | None:
    """Rows that at least one leg knows; None: all."""
    members: Bools | None = None
    for leg in scored.members:
        if leg is None:
            return None
        members = leg if members is None else members | leg
    return members


def _exclude(scores: Floats, scored: Scored, members: Bools | None) -> None:
    """Put what may not be ranked below every score."""
    if scored.mask is not None:
        np.copyto(scores, -1.0, where=~scored.mask)
    if members is not None:
        np.copyto(scores, -1.0, where=~members)
    scores[0] = -1.0


def best_rows(scores: Floats, mask: Bools | None, n: int) -> Ints:
    """Rows of about the `n` best positive scores (more, where scores are equal)."""
    if mask is not None:
        scores = np.where(mask, scores, 0.0)
    least = max(_nth_largest(scores, n), 1e-12)
    rows: Ints = (scores >= least).nonzero()[0]
    return rows[rows > 0]


def _nth_largest(values: Floats, n: int) -> float:
    """At most the n-th largest value, and near it; -1 when there are fewer."""
    size = len(values)
    if size <= n:
        return -1.0
    groups = n * _GROUPS_EACH
    if size >= 2 * groups:
        # The n-th largest of many groups' maxima. Few of the n largest share a group, and this
        # costs a fraction of a partition of all.
        whole = size // groups * groups
        values = np.maximum.reduce(values[:whole].reshape(-1, groups))
        size = groups
    else:
        values = values.copy()
    values.partition(size - n)
    return float(values[size - n])
