"""Postings hold exactly what was added and not removed, however they were merged meanwhile."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from agentmem_node.index import postings as module
from agentmem_node.index.analysis import analyzer
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.postings import Postings
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.source import IndexDoc
from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.search import SearchQuery

KEYS = [3, 5, 7, 9, 2**63 + 1, 2**64 - 1]
documents = st.lists(st.sampled_from(KEYS), max_size=8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), documents),
        st.tuples(st.just("replace"), st.integers(0, 99), documents),
        st.tuples(st.just("remove"), st.integers(0, 99)),
        st.tuples(st.just("merge")),
        st.tuples(st.just("pack")),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.booleans())
def test_postings_agree_with_a_plain_dictionary(steps: list[Any], eager: bool) -> None:
    held: dict[int, list[int]] = {}
    postings = Postings()
    next_row = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TAIL_MIN", 3 if eager else 2_048)
        for step in steps:
            rows = sorted(held)
            if step[0] == "add":
                postings.add([next_row], [step[1]])
                held[next_row] = step[1]
                next_row += 1
            elif step[0] == "merge":
                postings.merge()
            elif step[0] == "pack":
                new_row = np.zeros(next_row, dtype=np.int64)
                new_row[rows] = np.arange(1, len(rows) + 1)
                postings.renumber(new_row)
                held = {int(new_row[row]): terms for row, terms in held.items()}
                next_row = len(held) + 1
            elif rows:
                row = rows[step[1] % len(rows)]
                postings.remove(row)
                if step[0] == "remove":
                    del held[row]
                else:
                    postings.add([row], [step[2]])
                    held[row] = step[2]
            found = postings.find(np.array(KEYS, dtype=np.uint64))
            entries = postings.matches(found)
            assert found.frequencies == [
                sum(key in terms for terms in held.values()) for key in KEYS
            ]
            assert sorted(
                zip(
                    entries.term.tolist(),
                    entries.row.tolist(),
                    entries.occurrences.tolist(),
                    strict=True,
                )
            ) == sorted(
                (position, row, float(count))
                for row, terms in held.items()
                for position, key in enumerate(KEYS)
                if (count := Counter(terms)[key])
            )
            assert entries.term.tolist() == sorted(entries.term.tolist())


class Texts:
    dim = 0

    def __init__(self, texts: list[str]) -> None:
        self.docs = [
            IndexDoc(
                number,
                number.to_bytes(16, "big"),
                "acme",
                Memory(id="", content=text, user_id="ana", created_at="", updated_at=""),
                0,
                0,
                None,
                None,
            )
            for number, text in enumerate(texts)
        ]

    def scan(self, tenant: str, owner: str | None) -> Any:
        return iter(self.docs)

    def count(self, tenant: str, owner: str | None) -> int:
        return len(self.docs)

    def vectors(self, docs: Any) -> Any:
        raise AssertionError("a lexical search reads no vectors")

    def records(self, docs: Any) -> list[bytes]:
        return [b"{}" for _ in docs]

    def memory(self, doc: int) -> dict[str, Any]:
        return {}


class Lucene(BM25Okapi):  # type: ignore[misc]
    """rank-bm25 with the idf of Lucene: its own can be negative."""

    def _calc_idf(self, nd: dict[Any, int]) -> None:
        for word, frequency in nd.items():
            self.idf[word] = float(
                np.log(1 + (self.corpus_size - frequency + 0.5) / (frequency + 0.5))
            )


words = st.sampled_from(["tea", "garden", "river", "bees", "honey", "letter", "train", "oslo"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(words, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=20),
    st.lists(words, min_size=1, max_size=4, unique=True),
    st.sampled_from([(0.9, 0.4), (1.2, 0.75), (2.0, 0.0)]),
)
def test_bm25_without_context_is_that_of_rank_bm25(
    texts: list[str], asked: list[str], constants: tuple[float, float]
) -> None:
    k1, b = constants
    stems = analyzer("en")
    oracle = Lucene([stems.keys(text) for text in texts], k1=k1, b=b)
    keys = [stems.key(word) for word in asked]
    scores = oracle.get_scores([key for key in keys if key in oracle.idf])
    # Ours is a share of what could be reached: each term at most its idf times (k1 + 1).
    best = sum(oracle.idf.get(key, 0.5 * np.log(1 + (len(texts) + 0.5) / 0.5)) for key in keys)
    index = ShardIndex(Texts(texts), defaults=RankingDefaults(bm25_k1=k1, bm25_b=b))
    query = SearchQuery("acme", Scope(user_id="ana"), len(texts), 1, text=" ".join(asked))
    hits = {int.from_bytes(h.id, "big"): h.score for h in index.search_local(query).hits}
    for number, score in enumerate(scores):
        assert hits.get(number, 0.0) * best * (k1 + 1) == pytest.approx(score, abs=1e-6)
    ranking = sorted(hits, key=lambda n: (-hits[n], n))
    assert [hits[n] for n in ranking] == sorted(hits.values(), reverse=True)
