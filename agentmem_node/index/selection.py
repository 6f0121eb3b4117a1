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

_STRIDE: Final = 64

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


def weighted_page(
    scored: Scored, query: SearchQuery, defaults: RankingDefaults, read: ReadVectors
) -> list[Candidate]:
    """The best top_k + 1 after the cursor, by weighted score."""
    total, margin = _totals(scored, defaults)
    _exclude(total, scored, _any_member(scored))
    pool = total
    if query.after is not None:
        # What may come after the cursor; of that, what certainly does decides the depth.
        pool = np.where(total < query.after[0] - margin, total, -1.0)
    least = _nth_largest(pool, query.top_k + 1) - margin
    if query.threshold is not None:
        least = max(least, query.threshold - margin)
    chosen = total >= max(least, 0.0)
    if query.after is not None:
        chosen &= total <= query.after[0] + margin
    rows: Ints = chosen.nonzero()[0]
    if not len(rows):
        return []
    legs = _rescored(scored, rows, read)
    final = weighted_scores(legs, [weight for _, weight in scored.legs])
    columns = scored.block.columns
    order = np.lexsort((columns.id_low[rows], columns.id_high[rows], -final))
    if query.after is None and query.threshold is None:
        order = order[: query.top_k + 1]
    rows, final = rows[order], final[order]
    page: list[Candidate] = []
    for key, doc, score, scores in zip(
        _ids(scored.block, rows),
        columns.doc[rows].tolist(),
        final.tolist(),
        zip(*(leg[order].tolist() for leg in legs), strict=True),
        strict=True,
    ):
        if query.threshold is not None and score < query.threshold:
            break
        if query.after is None or (-score, key) > (-query.after[0], query.after[1]):
            page.append(Candidate(key, doc, score, scores))
            if len(page) > query.top_k:
                break
    return page


def _totals(scored: Scored, defaults: RankingDefaults) -> tuple[Floats, float]:
    """Weighted scores of all rows by int8, and how far from exact they may be."""
    weights = [weight for _, weight in scored.legs]
    weight_sum = sum(weights)
    total: Floats = scored.scores[0] * (weights[0] / weight_sum)
    # Rounding of sums in another order, far below the grid of scores.
    margin = 1e-9
    for (name, weight), scores in zip(scored.legs, scored.scores, strict=True):
        if scores is not scored.scores[0]:
            total += scores * (weight / weight_sum)
        if name == "vector":
            margin += defaults.rescore_steps / scored.block.vectors.scale * weight / weight_sum
    return total, margin


def ranked_lists(scored: Scored, defaults: RankingDefaults, read: ReadVectors) -> list[RankedRows]:
    """For each leg, its best (score, id, row), down to the rank window."""
    lists = []
    for number, (name, _) in enumerate(scored.legs):
        scores = scored.scores[number].copy()
        _exclude(scores, scored, scored.members[number])
        margin = 1e-9
        if name == "vector":
            margin += defaults.rescore_steps / scored.block.vectors.scale
        least = _nth_largest(scores, defaults.rank_window) - margin
        rows: Ints = (scores >= max(least, 0.0)).nonzero()[0]
        exact = on_grid(_rescored(scored, rows, read)[number])
        columns = scored.block.columns
        order = np.lexsort((columns.id_low[rows], columns.id_high[rows], -exact))
        order = order[: defaults.rank_window]
        rows = rows[order]
        lists.append(
            list(zip(exact[order].tolist(), _ids(scored.block, rows), rows.tolist(), strict=True))
        )
    return lists


def ranked_candidates(
    scored: Scored, lists: Sequence[RankedRows], read: ReadVectors
) -> list[Candidate]:
    """Every memory in one of the lists, with its score in all legs."""
    ids = {row: key for entries in lists for _, key, row in entries}
    rows: Ints = np.array(sorted(ids), dtype=np.int64)
    legs = _rescored(scored, rows, read)
    docs = scored.block.columns.doc[rows].tolist()
    scores = zip(*(leg.tolist() for leg in legs), strict=True)
    return [
        Candidate(ids[row], doc, 0.0, each)
        for row, doc, each in zip(rows.tolist(), docs, scores, strict=True)
    ]


def _rescored(scored: Scored, rows: Ints, read: ReadVectors) -> list[Floats]:
    """The legs' scores of some rows, the vector leg's corrected by the float32 originals."""
    legs = []
    for (name, _), scores in zip(scored.legs, scored.scores, strict=True):
        values: Floats = scores[rows]
        if name == "vector" and scored.vector is not None and scored.cosines is not None:
            block = scored.block
            exact = exact_cosines(read(block.columns.doc[rows]), scored.vector)
            values += scoring.exact_correction(
                block, rows, scored.cosines[rows], exact, with_text=scored.with_text
            )
            np.minimum(values, 1.0, out=values)
            np.maximum(values, 0.0, out=values)
        legs.append(values)
    return legs


def _ids(block: Block, rows: Ints) -> list[bytes]:
    """Ids of 16 bytes."""
    pairs = np.empty((len(rows), 2), dtype=">u8")
    pairs[:, 0] = block.columns.id_high[rows]
    pairs[:, 1] = block.columns.id_low[rows]
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
        scores[~scored.mask] = -1.0
    if members is not None:
        scores[~members] = -1.0
    scores[0] = -1.0


def _nth_largest(values: Floats, n: int) -> float:
    """At most the n-th largest value, and near it; -1 when there are fewer."""
    size = len(values)
    if size <= n:
        return -1.0
    if size > n * _STRIDE:
        # The n-th largest of the strides' maxima: no more than n values exceed it by less than
        # a stride's worth, and it costs a sixth of a partition.
        whole = size // _STRIDE * _STRIDE
        maxima = values[:whole].reshape(-1, _STRIDE).max(axis=1)
        if len(maxima) > n:
            values = maxima
            size = len(values)
    return float(np.partition(values, size - n)[size - n])
