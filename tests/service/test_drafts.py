"""What an add and a change are refused for, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import AgentMemError, InvalidField, TooLarge
from agentmem_node.model import requests as rq
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Memory
from agentmem_node.service.drafts import changed, content_hash, drafts_of, normalised

LIMITS = Limits(
    content_bytes_max=100, metadata_bytes_max=64, metadata_depth_max=3, categories_max=2
)


def add(**fields: Any) -> rq.AddRequest:
    return rq.AddRequest(**{"content": "Ana likes tea", "user_id": "ana", **fields})


def refused(item: rq.AddRequest, dim: int = 4) -> AgentMemError:
    with pytest.raises(AgentMemError) as caught:
        drafts_of(item, LIMITS, dim)
    assert caught.value.status in (400, 413)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"content": None}, "content"),
        ({"content": "   "}, "content"),
        ({"content": "x" * 101}, "content"),
        ({"messages": [rq.Message(role="user", content="hi")]}, "content"),
        ({"user_id": None}, "user_id"),
        ({"user_id": "a\0b"}, "user_id"),
        ({"user_id": "é" * 200}, "user_id"),
        ({"infer": True}, "infer"),
        ({"vector": [1.0, 2.0]}, "vector"),
        ({"vector": [0.0] * 4}, "vector"),
        ({"vector": [math.nan] * 4}, "vector"),
        ({"vector": [1e308] * 4}, "vector"),
        ({"metadata": {"a": {"b": {"c": {"d": 1}}}}}, "metadata"),
        ({"metadata": {"a": "x" * 100}}, "metadata"),
        ({"metadata": {"a": 2**63}}, "metadata"),
        ({"categories": ["a", "b", "c"]}, "categories"),
        ({"categories": [""]}, "categories"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"expires_at": "2026-13-01"}, "expires_at"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], field: str) -> None:
    error = refused(add(**fields))
    assert error.details["field"] == field
    assert error.message


def test_a_vector_needs_a_cluster_with_vectors() -> None:
    assert "lexical" in refused(add(vector=[1.0]), dim=0).message


def test_messages_become_one_draft_each_but_the_systems() -> None:
    messages = [
        rq.Message(role="system", content="be kind"),
        rq.Message(role="user", content="I moved to Oslo"),
        rq.Message(role="assistant", content="How is it?"),
    ]
    drafts = drafts_of(add(content=None, messages=messages), LIMITS, 4)
    assert [d.content for d in drafts] == ["I moved to Oslo", "How is it?"]
    assert drafts[0].metadata == {"role": "user"}


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
def test_a_stored_vector_has_unit_length(values: list[float]) -> None:
    if not any(values):
        return
    try:
        vector = np.frombuffer(normalised(values, 3), dtype="<f4")
    except InvalidField:
        assert max(map(abs, values)) < 1e-150
        return
    assert abs(float(np.linalg.norm(vector)) - 1.0) < 1e-5


def memory() -> Memory:
    (draft,) = drafts_of(add(), LIMITS, 4)
    return draft.to_memory("0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7", 1_000_000)


def test_a_change_touches_only_what_it_names_and_counts_the_version() -> None:
    before = memory()
    after = changed(before, rq.UpdateRequest(content="Ana likes coffee"), 2_000_000, LIMITS)
    assert (after.content, after.version) == ("Ana likes coffee", 2)
    assert after.hash == content_hash("Ana likes coffee") != before.hash
    untouched = ("id", "user_id", "importance", "metadata", "created_at")
    assert all(getattr(after, name) == getattr(before, name) for name in untouched)
    assert before.version == 1


def test_updated_at_never_runs_backwards() -> None:
    before = memory()
    after = changed(before, rq.UpdateRequest(importance=1.0), 0, LIMITS)
    assert after.updated_at == before.updated_at


def test_an_expiry_can_be_cleared_and_an_empty_change_is_refused() -> None:
    before = changed(memory(), rq.UpdateRequest(expires_at="2030-01-01"), 2_000_000, LIMITS)
    assert before.expires_at == "2030-01-01T00:00:00.000Z"
    assert changed(before, rq.UpdateRequest(expires_at=None), 3_000_000, LIMITS).expires_at is None
    with pytest.raises(InvalidField, match="empty"):
        changed(before, rq.UpdateRequest(), 3_000_000, LIMITS)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_metadata_is_stored_whole_or_refused(value: Any) -> None:
    try:
        (draft,) = drafts_of(add(metadata={"k": value}), LIMITS, 4)
    except (InvalidField, TooLarge):
        return
    assert msgspec.json.decode(msgspec.json.encode(draft.metadata)) == {"k": value}
