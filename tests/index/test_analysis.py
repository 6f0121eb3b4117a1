"""Texts become terms as documented: words, stop words, stems, pairs of unspaced characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.index.analysis import Analyzer, analyzer, query_terms, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ana's cat, 2nd floor", ["ana", "s", "cat", "2nd", "floor"]),
        ("東京都 Tokyo", ["東京", "京都", "tokyo"]),
        ("猫", ["猫"]),
        ("v2猫が好き2026", ["v2", "猫が", "が好", "好き", "2026"]),
        ("Ärger über Öl", ["ärger", "über", "öl"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_inflected_words_have_one_key_and_stop_words_none() -> None:
    english = analyzer("en")
    assert english.keys("She was walking the walked walks") == [english.key("walk")] * 3
    assert english.keys("to be or not to be") == []
    assert analyzer("de").key("häuser") == analyzer("de").key("haus")
    assert analyzer("none").keys("the walks") != analyzer("none").keys("the walk")


def test_the_terms_of_a_query_come_once_with_its_dates_last() -> None:
    english = analyzer("en")
    terms = query_terms("Tea, tea and honey in July 2023", "en")
    own = [english.key(word) for word in ("tea", "honey", "july", "2023")]
    dates = [english.key(term) for term in ("@m7", "@y2023")]
    assert terms.keys.tolist() == own + dates
    assert terms.words == 4


@given(st.text(max_size=40))
def test_keys_are_odd_64_bit_numbers_and_do_not_depend_on_the_cache(text: str) -> None:
    keys = analyzer("en").keys(text)
    assert keys == Analyzer("en").keys(text)
    assert all(0 < key < 2**64 and key % 2 for key in keys)


def test_the_cache_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentmem_node.index.analysis._CACHE_WORDS_MAX", 10)
    small = Analyzer("en")
    expected = [analyzer("en").key(f"word{n}") for n in range(50)]
    assert [small.key(f"word{n}") for n in range(50)] == expected
    assert len(small._keys) <= 10
