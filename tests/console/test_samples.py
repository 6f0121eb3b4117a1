"""The sample conversations can be loaded, and their questions can be answered from them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from rank_bm25 import BM25Okapi

from agentmem_node.model.limits import Limits
from agentmem_node.model.requests import AddRequest
from agentmem_node.model.times import parse_time_ms
from agentmem_node.samples import conversations, questions
from agentmem_node.service.drafts import drafts_of


def test_every_turn_is_an_add_that_the_service_accepts() -> None:
    for turn in conversations():
        request = msgspec.convert(turn, AddRequest)
        assert len(drafts_of(request, Limits(), 384)) == 1


def test_there_are_a_few_hundred_turns_of_several_people_over_months() -> None:
    turns = conversations()
    assert 300 <= len(turns) <= 400
    assert len({turn["user_id"] for turn in turns}) >= 5
    assert len({turn["created_at"][:7] for turn in turns}) >= 6
    assert len({turn["run_id"] for turn in turns}) >= 50
    assert len({turn["content"] for turn in turns}) == len(turns)


def test_turns_of_a_session_are_in_the_order_of_their_times() -> None:
    last: dict[str, int] = {}
    for turn in conversations():
        at = parse_time_ms(turn["created_at"], "created_at")
        assert at > last.get(turn["run_id"], 0)
        last[turn["run_id"]] = at


def test_a_question_is_answered_by_turns_of_the_one_it_is_about() -> None:
    turns = conversations()
    assert len(questions()) >= 30
    for question in questions():
        assert question.expected
        assert {turns[at]["user_id"] for at in question.expected} == {question.user_id}


def test_plain_bm25_finds_most_answers_so_the_questions_are_fair() -> None:
    turns = conversations()
    found = 0
    for question in questions():
        own = [at for at, turn in enumerate(turns) if turn["user_id"] == question.user_id]
        scores = BM25Okapi([words(turns[at]["content"]) for at in own]).get_scores(
            words(question.query)
        )
        best = sorted(zip(scores, own, strict=True), reverse=True)[:10]
        found += any(at in question.expected and score > 0 for score, at in best)
    share = found / len(questions())
    # Words alone must not be enough: the rest is for meaning and typos.
    assert 0.6 <= share <= 0.97, share


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("word", ["tea", "oolong", "rooibos"])
def test_the_search_that_the_demo_suggests_has_something_to_find(word: str) -> None:
    assert any(word in turn["content"].lower() for turn in conversations())


def test_the_documentation_names_the_number_of_turns() -> None:
    text = (Path(__file__).parents[2] / "docs" / "demo.md").read_text()
    assert f"It loads {len(conversations())}\nmemories" in text
