"""Phrases and misspelt words: found at once, the same with the engine or without, never stale."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.index import text_space
from agentmem_node.index.analysis import analyzer
from agentmem_node.index.blocks import BlockBudget
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.text_engine import Term, TextEngine
from agentmem_node.index.text_legs import TextQuery, alike, best_stretch
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import LegName, SearchQuery

_spec = importlib.util.spec_from_file_location(
    "index_texts", Path(__file__).with_name("conftest.py")
)
assert _spec is not None and _spec.loader is not None
kit = importlib.util.module_from_spec(_spec)
sys.modules["index_texts"] = kit
_spec.loader.exec_module(kit)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextEngine]:
    monkeypatch.setattr(text_space, "_MEMORIES_MIN", 1)
    made = TextEngine(tmp_path / "text")
    yield made
    made.close()


def query(text: str, *legs: tuple[LegName, float]) -> SearchQuery:
    return SearchQuery("acme", Scope(user_id="ana"), 100, kit.NOW_MS, text=text, legs=legs)


def settle(engine: TextEngine) -> None:
    deadline = time.monotonic() + 10
    while engine.pending:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def found(index: ShardIndex, text: str, leg: LegName) -> dict[int, float]:
    hits = index.search_local(query(text, (leg, 1.0))).hits
    return {int.from_bytes(hit.id, "big"): round(hit.score, 3) for hit in hits}


def test_a_phrase_is_found_where_its_words_stand_side_by_side(source: Any) -> None:
    source.add(1, "We walked along the river bank to the mill", None, user_id="ana")
    source.add(2, "The bank of the river", None, user_id="ana")
    source.add(3, "The river bank", None, user_id="ana")
    index = ShardIndex(source)
    assert found(index, "river bank", "phrase") == {1: 1.0, 3: 1.0}
    assert found(index, '"the river bank"', "phrase") == {1: 1.0, 3: 1.0}
    assert found(index, '"of the river" mill', "phrase") == {2: 1.0}
    assert found(index, "old mill by the river bank", "phrase") == {1: 0.5, 2: 0.25, 3: 0.5}
    assert found(index, '"to be or not"', "phrase") == {}


def test_a_misspelt_word_finds_the_right_one_but_less_well(source: Any) -> None:
    source.add(1, "Margherita brought chamomile", None, user_id="ana")
    source.add(2, "Chamomille, no: chamomile", None, user_id="ana")
    index = ShardIndex(source)
    assert found(index, "camomile", "fuzzy") == {1: 0.875, 2: 0.875}
    assert found(index, "chamomile", "fuzzy") == {1: 1.0, 2: 1.0}
    assert found(index, "margerita", "fuzzy") == {1: 0.889}
    assert found(index, "tea", "fuzzy") == {}


@given(st.text("abcd", min_size=1, max_size=9), st.text("abcd", max_size=9), st.integers(0, 2))
def test_likeness_counts_letters_changed_lost_added_or_swapped(
    sought: str, word: str, limit: int
) -> None:
    table = {(i, 0): i for i in range(len(sought) + 1)}
    table |= {(0, j): j for j in range(len(word) + 1)}
    for i in range(1, len(sought) + 1):
        for j in range(1, len(word) + 1):
            cost = min(
                table[i - 1, j] + 1,
                table[i, j - 1] + 1,
                table[i - 1, j - 1] + (sought[i - 1] != word[j - 1]),
            )
            if i > 1 and j > 1 and sought[i - 1] == word[j - 2] and sought[i - 2] == word[j - 1]:
                cost = min(cost, table[i - 2, j - 2] + 1)
            table[i, j] = cost
    distance = table[len(sought), len(word)]
    expected = 1 - distance / len(sought) if distance <= limit else 0.0
    assert alike(Term(sought, limit), word) == pytest.approx(expected)


@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=6),
    st.lists(st.sampled_from("abcde"), max_size=10),
    st.booleans(),
)
def test_the_best_stretch_is_the_longest_that_both_have(
    sought: list[str], text: list[str], quoted: bool
) -> None:
    asked = '"' + " ".join(sought) + '"' if quoted else " ".join(sought)
    (phrase,) = TextQuery.of(asked, analyzer("none")).phrases
    held = {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    least = len(sought) if quoted else min(2, len(sought))
    lengths = [
        j - i
        for i in range(len(sought))
        for j in range(i + least, len(sought) + 1)
        if tuple(sought[i:j]) in held
    ]
    assert best_stretch(phrase, text) == max(lengths, default=0)


SEARCHES = [
    ("tea garden river", "phrase"),
    ('"honey letter"', "phrase"),
    ("teh gardne letter", "fuzzy"),
    ("Oslo", "phrase"),
    ("the tea", "fuzzy"),
]


def test_the_engine_proposes_all_that_a_full_look_finds(source: Any, engine: TextEngine) -> None:
    import random

    chance = random.Random(5)
    with_engine, without = ShardIndex(source, text_engine=engine), ShardIndex(source)
    docs: list[int] = []
    for number in range(300):
        kind = chance.random()
        text = " ".join(chance.choices(kit.WORDS, k=6))
        if kind < 0.6 or not docs:
            change = source.add(number, text, None, user_id="ana")
            docs.append(change.doc)
        elif kind < 0.8:
            change = source.update(chance.choice(docs), None, content=text)
        else:
            change = source.delete(docs.pop(chance.randrange(len(docs))))
        with_engine.apply([change])
        without.apply([change])
        if number % 20 == 0:
            if number % 60 == 0:
                settle(engine)
            asked = query(*[(t, (leg, 1.0)) for t, leg in SEARCHES][number // 20 % len(SEARCHES)])
            assert with_engine.search_local(asked) == without.search_local(asked)
    settle(engine)
    for text, leg in SEARCHES:
        asked = query(text, (leg, 1.0))
        assert with_engine.search_local(asked) == without.search_local(asked)
        assert with_engine.search_local(asked).hits


def test_filling_in_steps_waits_for_the_commit(source: Any, engine: TextEngine) -> None:
    for number in range(500):
        source.add(number, "honey letter", None, user_id="ana")
    index = ShardIndex(source, text_engine=engine)
    asked = query("honey", ("phrase", 1.0))
    assert index.needs_build(asked)
    deadline = time.monotonic() + 10
    for _ in index.build_steps(asked):
        assert time.monotonic() < deadline
    assert not index.needs_build(asked)
    assert index.stats()["text_documents"] == 500
    assert len(index.search_local(asked).hits) == 100


def test_a_forgotten_block_leaves_the_engine(source: Any, engine: TextEngine) -> None:
    source.add(1, "honey letter", None, user_id="ana")
    source.add(2, "honey letter", None, user_id="bo")
    index = ShardIndex(source, text_engine=engine, budget=BlockBudget(1))
    assert found(index, "honey", "phrase") == {1: 1.0}
    settle(engine)
    assert engine.documents == 1
    other = SearchQuery(
        "acme", Scope(user_id="bo"), 5, kit.NOW_MS, text="honey", legs=(("bm25", 1.0),)
    )
    index.search_local(other)
    settle(engine)
    assert engine.documents == 0
    assert found(index, "honey", "phrase") == {1: 1.0}


def test_an_engine_starts_empty_whatever_its_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "meta.json").write_text("damaged")
    engine = TextEngine(tmp_path / "text")
    space = engine.open_space()
    engine.put(space, 7, ["honey"])
    settle(engine)
    assert engine.with_phrases(space, [["honey"]]) == [7]
    engine.close()


def test_when_the_engine_fails_everything_is_still_found(
    source: Any, engine: TextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no space left on device")

    for number in range(300):
        source.add(number, "honey letter", None, user_id="ana")
    index = ShardIndex(source, text_engine=engine)
    asked = query("honey", ("phrase", 1.0))
    for _ in index.build_steps(asked):
        pass
    monkeypatch.setattr(engine, "_perform", fail)
    for number in range(300, 600):
        index.apply([source.add(number, "honey letter", None, user_id="ana")])
    deadline = time.monotonic() + 10
    for _ in index.build_steps(asked):
        assert time.monotonic() < deadline
    index.apply([source.delete(1)])
    wide = dataclasses.replace(asked, top_k=1_000)
    assert len(index.search_local(wide).hits) == 599
    assert index.search_local(wide) == ShardIndex(source).search_local(wide)
