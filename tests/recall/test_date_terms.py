"""What counts as a date in a question, and that a memory's own day answers it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.index.date_terms import document_terms, query_terms

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("question", "terms"),
    [
        ("What did we plan in July 2023?", {"@m7", "@y2023"}),
        ("Who came on 12 July?", {"@m7", "@d7-12"}),
        ("Who came on July 12th, 2023?", {"@m7", "@d7-12", "@y2023"}),
        ("the 3rd of Sept. 2021", {"@m9", "@d9-3", "@y2021"}),
        ("Which deploys failed on 2024-02-29?", {"@y2024", "@m2", "@d2-29"}),
        ("release notes 2024-02", {"@y2024", "@m2"}),
        ("Where was Ana last may?", {"@m5"}),
        ("summer 2021 in Porto", {"@y2021"}),
        ("february plans", {"@m2"}),
        ("between May and June", {"@m5", "@m6"}),
    ],
)
def test_a_question_has_the_terms_of_the_dates_that_it_names(
    question: str, terms: set[str]
) -> None:
    assert set(query_terms(question)) == terms
    assert set(query_terms(question.upper())) == terms


@pytest.mark.parametrize(
    "question",
    [
        "",
        "May I ask what Mark may like?",
        "the march for rights",
        "mayor Augustus and his decor",
        "room 12, 30 people, 300 euros",
        "version 2024001",
    ],
)
def test_words_that_only_look_like_dates_are_none(question: str) -> None:
    assert query_terms(question) == []


@given(st.integers(0, 4_102_444_799_999))
def test_a_memory_answers_a_question_that_names_its_day(created_ms: int) -> None:
    terms = document_terms(created_ms)
    day = EPOCH + timedelta(milliseconds=created_ms)
    assert (
        set(terms) == set(query_terms(f"on {day:%d %B %Y}")) == set(query_terms(f"{day:%Y-%m-%d}"))
    )


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
def test_every_time_that_a_memory_can_have_gives_terms(created_ms: int) -> None:
    assert len(set(document_terms(created_ms))) == 3


@given(st.text())
def test_no_text_breaks_it_and_no_term_comes_twice(text: str) -> None:
    terms = query_terms(text)
    assert len(terms) == len(set(terms))
    assert all(term.startswith("@") for term in terms)
