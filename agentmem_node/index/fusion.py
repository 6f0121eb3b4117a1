"""From the legs' lists to one order. Pure: the same lists give the same order, wherever made.

`weighted`: the mean of the legs' scores (0 where a leg does not know a memory), by weight.
`rrf`: reciprocal rank fusion over ranks among all shards, scaled so that first in every leg is 1.
Equal scores are ordered by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentmem_node.index.columns import Floats
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.model.search import Hit, LegHit, LegName, SearchQuery

# Scores that differ by less than this are equal: the last bits of exp and log differ by machine.
_SCORE_STEPS = float(1 << 32)


@dataclass(slots=True)
class Candidate:
    """A memory that one shard proposes, with its score in each leg (in the order of the legs)."""

    id: bytes
    doc: int
    score: float  # weighted fusion: the final score; rrf: 0, since only all shards know it
    scores: tuple[float, ...]
    record: bytes = b""  # with the weighted fusion, where it is known to be needed


@dataclass(slots=True)
class LegResults:
    """One shard's answer to a search: what `fuse` needs, and what travels between nodes."""

    candidates: list[Candidate]
    ranked: list[list[tuple[float, bytes]]]  # a leg: its best (score, id), down to the rank window

    def to_wire(self) -> list[Any]:
        rows = [(c.id, c.doc, c.score, c.scores, c.record) for c in self.candidates]
        return [rows, self.ranked]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> LegResults:
        rows, ranked = wire
        lists = [[(float(score), key) for score, key in leg] for leg in ranked]
        return cls(
            [Candidate(key, doc, score, tuple(s), record) for key, doc, score, s, record in rows],
            lists,
        )


@dataclass(slots=True)
class Fused:
    """The page. `missing`: hits whose record is still to be fetched: (position, part, doc)."""

    hits: list[Hit]
    next_after: tuple[float, bytes] | None
    missing: list[tuple[int, int, int]] = field(default_factory=list)


def on_grid(scores: Floats) -> Floats:
    """Scores rounded to what counts as different."""
    rounded: Floats = np.rint(scores * _SCORE_STEPS)
    rounded /= _SCORE_STEPS
    return rounded


def weighted_scores(legs: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """The mean of the legs' scores by weight, on the grid of scores."""
    total: Floats = legs[0] * weights[0]
    for scores, weight in zip(legs[1:], weights[1:], strict=True):
        total += scores * weight
    total *= _SCORE_STEPS / sum(weights)
    np.rint(total, out=total)
    total *= 1.0 / _SCORE_STEPS
    return total


def fuse(
    query: SearchQuery,
    legs: Sequence[tuple[LegName, float]],
    parts: Sequence[LegResults],
    defaults: RankingDefaults,
) -> Fused:
    """One page out of every shard's results; `legs` are those that apply (`active_legs`)."""
    weights = [weight for _, weight in legs]
    ranks = _ranks(parts, len(legs), defaults) if query.explain or query.fusion == "rrf" else []
    found: list[tuple[float, bytes, int, Candidate]] = []
    for number, part in enumerate(parts):
        for candidate in part.candidates:
            if query.fusion == "rrf":
                score = _rrf_score(candidate.id, ranks, weights, defaults)
            else:
                score = candidate.score
            if query.threshold is not None and score < query.threshold:
                continue
            if query.after is None or (-score, candidate.id) > (-query.after[0], query.after[1]):
                found.append((-score, candidate.id, number, candidate))
    found.sort(key=lambda row: row[:2])
    hits: list[Hit] = []
    missing = []
    for negative, key, number, candidate in found[: query.top_k]:
        hit = Hit(key, -negative, candidate.record)
        if query.explain:
            hit.legs = _explained(query, candidate, legs, ranks, defaults)
        if not candidate.record:
            missing.append((len(hits), number, candidate.doc))
        hits.append(hit)
    # Every part proposes one more than a page holds.
    after = (hits[-1].score, hits[-1].id) if len(found) > query.top_k else None
    return Fused(hits, after, missing)


def _ranks(
    parts: Sequence[LegResults], legs: int, defaults: RankingDefaults
) -> list[dict[bytes, int]]:
    """For each leg, 1-based ranks over all parts, down to the window."""
    ranks = []
    for leg in range(legs):
        merged = sorted(
            ((-score, key) for part in parts for score, key in part.ranked[leg]),
        )[: defaults.rank_window]
        ranks.append({key: rank for rank, (_, key) in enumerate(merged, start=1)})
    return ranks


def _rrf_score(
    key: bytes,
    ranks: Sequence[dict[bytes, int]],
    weights: Sequence[float],
    defaults: RankingDefaults,
) -> float:
    total = 0.0
    for leg, weight in zip(ranks, weights, strict=True):
        rank = leg.get(key)
        if rank is not None:
            total += weight / (defaults.rrf_k + rank)
    total *= (defaults.rrf_k + 1) / sum(weights)
    return round(total * _SCORE_STEPS) / _SCORE_STEPS


def _explained(
    query: SearchQuery,
    candidate: Candidate,
    legs: Sequence[tuple[LegName, float]],
    ranks: Sequence[dict[bytes, int]],
    defaults: RankingDefaults,
) -> dict[str, LegHit]:
    """Each leg's part in the score; contributions add up to it. Rank 0: beyond the rank window."""
    weight_sum = sum(weight for _, weight in legs)
    explained: dict[str, LegHit] = {}
    for (name, weight), score, leg_ranks in zip(legs, candidate.scores, ranks, strict=True):
        rank = leg_ranks.get(candidate.id, 0)
        if query.fusion == "weighted":
            contribution = score * weight / weight_sum
        elif rank:
            contribution = weight / (defaults.rrf_k + rank) * (defaults.rrf_k + 1) / weight_sum
        else:
            contribution = 0.0
        explained[name] = LegHit(rank, score, weight, contribution)
    return explained
