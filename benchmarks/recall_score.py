"""How well a list of results answers a question whose evidence is known.

recall@k of a question is the share of its evidence turns among the first k results; its
reciprocal rank is 1 / rank of the first evidence turn, 0 when none was found. Figures are means
over questions: every question counts the same, however much evidence it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

CUTS = (1, 5, 10, 20)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one question, or the mean of several. `recall` is in the order of `CUTS`."""

    recall: tuple[float, ...]
    reciprocal_rank: float
    questions: int = 1

    def as_dict(self) -> dict[str, float | int]:
        named = {f"recall@{k}": round(r, 4) for k, r in zip(CUTS, self.recall, strict=True)}
        return {**named, "mrr": round(self.reciprocal_rank, 4), "questions": self.questions}


def score(ranked: Sequence[int], evidence: Collection[int]) -> Score:
    """`ranked`: positions of the results, best first.

    >>> score([7, 3, 9], {3, 4}).recall
    (0.0, 0.5, 0.5, 0.5)
    """
    ranks = [rank for rank, found in enumerate(ranked, 1) if found in evidence]
    recall = tuple(sum(rank <= k for rank in ranks) / len(evidence) for k in CUTS)
    return Score(recall, 1 / ranks[0] if ranks else 0.0)


def mean(scores: Iterable[Score]) -> Score:
    """Raises ValueError when there are none."""
    every = list(scores)
    if not every:
        raise ValueError("no questions")
    return Score(
        tuple(sum(s.recall[i] for s in every) / len(every) for i in range(len(CUTS))),
        sum(s.reciprocal_rank for s in every) / len(every),
        len(every),
    )
