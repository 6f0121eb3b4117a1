"""Splicing is what decoding and encoding again would give; decoding names what it refuses."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentmem_cluster.errors import AgentMemError, BadRequest, InvalidField
from agentmem_node.api.decoding import BatchAddBody, Body, Query
from agentmem_node.api.exchange import write_identity
from agentmem_node.api.splice import found_memory, list_body, search_body
from agentmem_node.model import requests as rq
from agentmem_node.model.memory import Memory
from agentmem_node.model.search import Hit, LegHit, SearchAnswer

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
scores = st.floats(0, 1)
memories = st.builds(
    Memory,
    id=texts,
    content=texts,
    user_id=st.none() | texts,
    metadata=st.dictionaries(texts, values, max_size=3),
    categories=st.lists(texts, max_size=2),
    created_at=texts,
    updated_at=texts,
)
leg_reports = st.builds(LegHit, st.integers(1, 9), scores, scores, scores)
legs = st.dictionaries(st.sampled_from(["vector", "bm25"]), leg_reports)


def as_json(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


@given(memories, scores, legs)
def test_a_found_memory_is_the_memory_with_its_score(
    memory: Memory, score: float, found_by: dict[str, LegHit]
) -> None:
    hit = Hit(b"", score, msgspec.json.encode(memory), found_by)
    assert json.loads(found_memory(hit, explain=False)) == as_json(memory) | {"score": score}
    assert json.loads(found_memory(hit, explain=True)) == as_json(memory) | {
        "score": score,
        "legs": as_json(found_by),
    }


@given(st.lists(st.tuples(memories, scores), max_size=4), texts, st.none() | texts)
def test_an_answer_is_whole_json_whatever_is_in_it(
    found: list[tuple[Memory, float]], token: str, cursor: str | None
) -> None:
    hits = [Hit(b"", score, msgspec.json.encode(memory)) for memory, score in found]
    answer = SearchAnswer(hits, [token], {}, took_ms=1.23456)
    body = json.loads(search_body(answer, token=token, next_cursor=cursor, explain=False))
    assert [item["content"] for item in body["results"]] == [m.content for m, _ in found]
    assert (body["token"], body["next_cursor"], body["partial"]) == (token, cursor, [token])
    assert body["took_ms"] == 1.235
    page = rq.ListAnswer(
        results=[msgspec.Raw(hit.record) for hit in hits],
        next_cursor=cursor,
        partial=[],
        token=token,
    )
    assert json.loads(list_body(page)) == {
        "results": [as_json(memory) for memory, _ in found],
        "next_cursor": cursor,
        "partial": [],
        "token": token,
    }


def test_details_come_only_when_explained() -> None:
    answer = SearchAnswer([], [], {}, details={"why": 1})
    assert "details" not in json.loads(
        search_body(answer, token="", next_cursor=None, explain=False)
    )
    explained = json.loads(search_body(answer, token="", next_cursor=None, explain=True))
    assert explained["details"] == {"why": 1}


items = st.dictionaries(
    st.sampled_from(rq.AddRequest.__struct_fields__) | texts, values, max_size=4
)


@given(st.lists(items, max_size=5))
def test_each_item_of_a_batch_is_decoded_or_refused_as_if_it_came_alone(
    batch: list[dict[str, Any]],
) -> None:
    alone = Body(rq.AddRequest, noun="item")
    body = json.dumps({"memories": batch}).encode()
    decoded = BatchAddBody().decode(body)
    assert len(decoded) == len(batch)
    for item, got in zip(batch, decoded, strict=True):
        try:
            expected: Any = alone.decode(json.dumps(item).encode())
        except BadRequest as error:
            assert isinstance(got, AgentMemError)
            assert (type(got), got.message, got.details) == (
                type(error),
                error.message,
                error.details,
            )
        else:
            assert got == expected


@given(texts.filter(lambda name: name not in rq.SearchRequest.__struct_fields__))
@example("`")
@example("\n")
def test_an_unknown_field_is_always_named(name: str) -> None:
    with pytest.raises(InvalidField) as raised:
        Body(rq.SearchRequest).decode(json.dumps({"query": "a", name: 1}).encode())
    assert raised.value.details["field"] == name
    with pytest.raises(InvalidField) as raised:
        Query(rq.ListQuery).decode([("limit", "5"), (name if name != "" else "-", "x")])
    assert raised.value.details["field"] in (name, "-")


@given(st.binary(max_size=60))
def test_no_bytes_break_a_decoder(body: bytes) -> None:
    for decoder in (Body(rq.AddRequest), BatchAddBody()):
        try:
            decoder.decode(body)
        except BadRequest as error:
            assert error.message


@given(
    st.lists(
        st.tuples(st.sampled_from(["ana", "an"]), st.sampled_from(["a", "ak", "k"]), st.binary()),
        min_size=2,
        max_size=2,
    )
)
def test_two_writes_share_an_identity_only_if_they_are_the_same(
    writes: list[tuple[str, str, bytes]],
) -> None:
    class Url:
        raw_path_qs = "/x"

    class Request:
        method = "POST"
        rel_url = Url()

        def __init__(self, key: str) -> None:
            self.headers = {"Idempotency-Key": key}

    found: list[Any] = []
    for tenant, key, body in writes:
        request: Any = Request(key)
        found.append(write_identity(request, tenant, body))
    (first, second), (one, other) = writes, found
    assert (one[0] == other[0]) == (first[:2] == second[:2])
    assert (one[1] == other[1]) == (first[2] == second[2])


@pytest.mark.parametrize(
    ("type_", "body", "allowed"),
    [
        (rq.SearchRequest, {"query": "a", "legs": ["foo"]}, "vector, bm25, phrase, fuzzy"),
        (rq.SearchRequest, {"query": "a", "legs": {"foo": 1}}, "vector, bm25, phrase, fuzzy"),
        (rq.SearchBatchRequest, {"searches": [{"query": "a", "fusion": "x"}]}, "weighted, rrf"),
        (rq.AddRequest, {"content": "x", "memory_type": "fact"}, "episodic, factual"),
    ],
)
def test_a_word_that_is_none_of_the_few_is_answered_with_them(
    type_: type[msgspec.Struct], body: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(InvalidField) as refused:
        Body(type_).decode(msgspec.json.encode(body))
    assert refused.value.hint.startswith("Allowed: " + allowed)
