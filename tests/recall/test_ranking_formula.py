"""The default ranking is the formula of docs/retrieval.md: an oracle in plain Python judges it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_node.index.analysis import analyzer
from agentmem_node.index.date_terms import document_terms, query_terms
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.source import IndexDoc
from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.search import SearchQuery
from agentmem_node.model.times import format_ms

DIM = 16
DAY_MS = 86_400_000
START_MS = 1_689_120_000_000  # 12 July 2023
K1, B, TRUST, UNKNOWN = 0.9, 0.4, 4, 0.5
LENT = {-2: 0.35, -1: 0.35, 1: 0.2, 2: 0.2}
# The neighbours' cosines are those of int8 vectors.
TOLERANCE = 4e-3


@dataclass(frozen=True)
class Turn:
    content: str
    run: str | None
    at_ms: int
    vector: npt.NDArray[np.float32]


def unit(values: Sequence[float]) -> npt.NDArray[np.float32]:
    vector = np.array(values, np.float32) + np.float32(1e-3)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class Oracle:
    """One owner's memories, scored as the document says, as plainly as it can be written."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = turns
        words = analyzer("en")
        self.counts = [Counter(words.keys(turn.content)) for turn in turns]
        self.length = [count.total() for count in self.counts]
        for count, turn in zip(self.counts, turns, strict=True):
            count.update(words.key(term) for term in document_terms(turn.at_ms))
        self.average = sum(self.length) / len(turns) or 1.0
        self.around = [self._around(i) for i in range(len(turns))]

    def _around(self, i: int) -> list[tuple[int, float]]:
        """(position, weight) of a memory itself and of those that lend to it."""
        run = self.turns[i].run
        if run is None:
            return [(i, 1.0)]
        order = sorted(
            (j for j, turn in enumerate(self.turns) if turn.run == run),
            key=lambda j: (self.turns[j].at_ms, j),
        )
        here = order.index(i)
        lenders = [
            (order[here + step], weight)
            for step, weight in LENT.items()
            if 0 <= here + step < len(order)
        ]
        return [(i, 1.0), *lenders]

    def idf(self, key: int) -> float:
        holding = sum(key in count for count in self.counts)
        return math.log(1 + (len(self.turns) - holding + 0.5) / (holding + 0.5))

    def words(self, text: str, i: int) -> float:
        known = {key for count in self.counts for key in count}
        own = set(analyzer("en").keys(text))
        dates = {analyzer("en").key(term) for term in query_terms(text)} - own
        best = sum(self.idf(key) * (1 if key in known else UNKNOWN) for key in own)
        best += sum(self.idf(key) for key in dates & known)
        near = self.around[i]
        length = sum(w * self.length[j] for j, w in near) / sum(w for _, w in near)
        total = 0.0
        for key in (own | dates) & known:
            held = sum(w * self.counts[j][key] for j, w in near)
            total += self.idf(key) * held / (held + K1 * (1 - B + B * length / self.average))
        return total / best if best else 0.0

    def meaning(self, vector: npt.NDArray[np.float32], i: int) -> float:
        def trusted(j: int) -> float:
            cosine = max(0.0, float(self.turns[j].vector @ vector))
            return cosine * (self.length[j] + 1) / (self.length[j] + 1 + TRUST)

        near = self.around[i]
        return sum(w * trusted(j) for j, w in near) / sum(w for _, w in near)


class MemorySource:
    dim = DIM

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.docs = [
            IndexDoc(
                number,
                number.to_bytes(16, "big"),
                "acme",
                Memory(
                    id=str(number),
                    content=turn.content,
                    user_id="ana",
                    run_id=turn.run,
                    created_at=format_ms(turn.at_ms),
                    updated_at=format_ms(turn.at_ms),
                ),
                turn.at_ms,
                turn.at_ms,
                None,
                turn.vector.tobytes(),
            )
            for number, turn in enumerate(turns, 1)
        ]

    def scan(self, tenant: str, owner: str | None) -> Iterator[IndexDoc]:
        return iter(self.docs)

    def count(self, tenant: str, owner: str | None) -> int:
        return len(self.docs)

    def vectors(self, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        rows = [np.frombuffer(self.docs[int(doc) - 1].vector or b"", "<f4") for doc in docs]
        return np.stack(rows) if rows else np.zeros((0, DIM), np.float32)

    def records(self, docs: Sequence[int]) -> list[bytes]:
        return [b"{}" for _ in docs]

    def memory(self, doc: int) -> dict[str, Any]:
        return {}


def found(turns: Sequence[Turn], **asked: Any) -> dict[int, float]:
    """Position in `turns` -> score, of everything that a default search finds."""
    query = SearchQuery(
        tenant="acme",
        scope=Scope(user_id="ana"),
        top_k=len(turns) + 1,
        now_ms=START_MS + 400 * DAY_MS,
        **asked,
    )
    hits = ShardIndex(MemorySource(turns)).search_local(query).hits
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    return {int.from_bytes(hit.id, "big") - 1: hit.score for hit in hits}


_WORDS = ["tea", "garden", "river", "bees", "honey", "letter", "Oslo", "train", "July", "the"]
_TEXTS = st.lists(st.sampled_from(_WORDS), min_size=0, max_size=9).map(" ".join)
_VECTORS = st.lists(st.floats(-1, 1, width=32), min_size=DIM, max_size=DIM).map(unit)
_TURNS = st.builds(
    Turn,
    content=_TEXTS,
    run=st.sampled_from(["monday", "friday", None]),
    at_ms=st.integers(0, 40).map(lambda day: START_MS + day * DAY_MS),
    vector=_VECTORS,
)
_QUESTIONS = st.lists(
    st.sampled_from([*_WORDS, "zebra", "in August 2023", "on 20 July"]), min_size=1, max_size=5
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(_TURNS, min_size=1, max_size=25), _QUESTIONS, _VECTORS)
def test_a_score_is_the_documented_formula(
    turns: list[Turn], question: str, vector: npt.NDArray[np.float32]
) -> None:
    oracle = Oracle(turns)
    scores = found(turns, text=question, vector=vector.tobytes())
    for i in range(len(turns)):
        expected = (oracle.words(question, i) + oracle.meaning(vector, i)) / 2
        assert scores.get(i, 0.0) == pytest.approx(expected, abs=TOLERANCE)
        assert 0.0 <= scores.get(i, 0.0) <= 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(_TURNS, min_size=1, max_size=25), _QUESTIONS)
def test_words_alone_decide_when_there_is_no_vector(turns: list[Turn], question: str) -> None:
    oracle = Oracle(turns)
    scores = found(turns, text=question)
    for i in range(len(turns)):
        assert scores.get(i, 0.0) == pytest.approx(oracle.words(question, i), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(_TURNS, min_size=1, max_size=25), _VECTORS)
def test_a_vector_alone_is_compared_by_plain_cosine(
    turns: list[Turn], vector: npt.NDArray[np.float32]
) -> None:
    scores = found(turns, vector=vector.tobytes())
    for i, turn in enumerate(turns):
        assert scores[i] == pytest.approx(max(0.0, float(turn.vector @ vector)), abs=1e-4)


def turn(content: str, run: str | None, minute: int = 0) -> Turn:
    return Turn(content, run, START_MS + minute * 60_000, unit([1.0] + [0.0] * (DIM - 1)))


def test_an_answer_is_found_by_the_question_before_it() -> None:
    turns = [
        turn("Did you see the lighthouse?", "r1", 0),
        turn("Yes, last weekend, with everybody.", "r1", 1),
        turn("Yes, last weekend, with everybody.", "r2", 2),
    ]
    scores = found(turns, text="lighthouse")
    assert scores[0] > scores[1] > 0.0
    assert 2 not in scores  # the same words in another run: nobody there spoke of a lighthouse


def test_the_year_of_a_memory_decides_between_equal_ones() -> None:
    then, later = turn("We repainted the boat", None), turn("We repainted the boat", None)
    later = Turn(later.content, None, then.at_ms + 366 * DAY_MS, later.vector)
    assert max(found([then, later], text="boat in 2023").items(), key=lambda s: s[1])[0] == 0
    assert max(found([then, later], text="boat in 2024").items(), key=lambda s: s[1])[0] == 1


def test_a_question_about_unknown_things_scores_low_though_one_word_is_known() -> None:
    turns = [turn(f"Note {i}: the tea was good", None) for i in range(10)]
    known = max(found(turns, text="tea").values())
    assert max(found(turns, text="tea zebra submarine").values()) < known / 2
