"""Filters are read as documented, and every mistake in one is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_cluster.errors import InvalidFilter
from agentmem_node.model.filters import And, Compare, Not, Or, parse_filter, scope_of
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Scope

LIMITS = Limits(filter_depth_max=4, filter_terms_max=10)


def parsed(value: Any) -> Any:
    return parse_filter(value, LIMITS)


def test_the_example_of_the_documentation_is_read() -> None:
    tree = parsed(
        {
            "AND": [
                {"user_id": "ana"},
                {"created_at": {"gte": "2026-01-01"}},
                {"NOT": {"categories": {"contains": "work"}}},
                {"metadata.city": {"in": ["Oslo"]}},
            ]
        }
    )
    assert tree == And(
        (
            Compare("user_id", "eq", "ana"),
            Compare("created_at", "gte", 1_767_225_600_000),
            Not(Compare("categories", "contains", "work")),
            Compare("metadata.city", "in", ("Oslo",)),
        )
    )


def test_an_empty_filter_is_none() -> None:
    assert parsed({}) is None


def test_siblings_and_operators_of_one_field_are_all_demanded() -> None:
    assert parsed({"user_id": "ana", "importance": {"gte": 0.5, "lt": 1}}) == And(
        (
            Compare("user_id", "eq", "ana"),
            Compare("importance", "gte", 0.5),
            Compare("importance", "lt", 1.0),
        )
    )


def test_logic_beside_other_keys_is_kept() -> None:
    assert parsed({"OR": [{"id": "A"}, {"id": "b"}], "agent_id": "x"}) == And(
        (Or((Compare("id", "eq", "a"), Compare("id", "eq", "b"))), Compare("agent_id", "eq", "x"))
    )


def test_not_of_a_list_is_none_of_them() -> None:
    assert parsed({"NOT": [{"user_id": "a"}, {"user_id": "b"}]}) == Not(
        Or((Compare("user_id", "eq", "a"), Compare("user_id", "eq", "b")))
    )


def test_a_star_is_any_and_null_is_none() -> None:
    assert parsed({"user_id": "*"}) == Compare("user_id", "exists", True)
    assert parsed({"user_id": {"ne": "*"}}) == Compare("user_id", "exists", False)
    assert parsed({"user_id": {"in": ["ana", "*"]}}) == Compare("user_id", "exists", True)
    assert parsed({"run_id": None}) == Compare("run_id", "exists", False)
    assert parsed({"expires_at": {"ne": None}}) == Compare("expires_at", "exists", True)
    assert parsed({"metadata.city": "*"}) == Compare("metadata.city", "eq", "*")


def test_metadata_is_named_either_way() -> None:
    assert parsed({"metadata": {"city": "Oslo"}}) == parsed({"metadata.city": "Oslo"})
    assert parsed({"metadata": {"a": {"gt": 1}, "b": True}}) == And(
        (Compare("metadata.a", "gt", 1), Compare("metadata.b", "eq", True))
    )


def test_the_names_of_mem0_are_known() -> None:
    assert parsed({"timestamp": {"gte": 1_700_000_000}}) == Compare(
        "created_at", "gte", 1_700_000_000_000
    )
    assert parsed({"memory_ids": ["A-1"]}) == Compare("id", "in", ("a-1",))
    assert parsed({"keywords": {"icontains": "tea"}}) == Compare("content", "icontains", "tea")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"userId": "ana"}, "metadata.userId"),
        ({"user_id": {"like": "a"}}, "'like'"),
        ({"user_id": {"gt": "a"}}, "'gt'"),
        ({"user_id": 7}, "`user_id`"),
        ({"user_id": {}}, "`user_id`"),
        ({"created_at": {"gte": "yesterday"}}, "`created_at`"),
        ({"created_at": True}, "`created_at`"),
        ({"importance": "high"}, "`importance`"),
        ({"importance": {"exists": True}}, "'exists'"),
        ({"importance": {"lt": 10**400}}, "`importance`"),
        ({"created_at": 10**400}, "`created_at`"),
        ({"memory_type": "poem"}, "episodic"),
        ({"memory_type": None}, "`memory_type`"),
        ({"categories": {"in": []}}, "`categories.in`"),
        ({"categories": {"exists": 1}}, "`categories.exists`"),
        ({"AND": []}, "`AND`"),
        ({"OR": {"user_id": "a"}}, "`OR`"),
        ({"NOT": []}, "`NOT`"),
        ({"AND": [{}]}, "non-empty object"),
        ([], "object"),
        (None, "object"),
        ({"metadata": {}}, "`metadata`"),
        ({"metadata.": 1}, "'metadata.'"),
        ({"metadata.n": {"gt": [1]}}, "`metadata.n.gt`"),
        ({"metadata.n": float("nan")}, "NaN"),
        ({"content": {"contains": 3}}, "`content.contains`"),
    ],
)
def test_a_mistake_is_named(wrong: Any, named: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parsed(wrong)
    assert named in f"{caught.value.message} {caught.value.hint}"


def test_depth_and_size_are_bounded() -> None:
    deep: dict[str, Any] = {"user_id": "a"}
    for _ in range(5):
        deep = {"NOT": deep}
    with pytest.raises(InvalidFilter, match=r"limits\.filter_depth_max"):
        parsed(deep)
    with pytest.raises(InvalidFilter, match=r"limits\.filter_terms_max"):
        parsed({"user_id": {"in": [str(i) for i in range(11)]}})
    with pytest.raises(InvalidFilter, match=r"limits\.filter_terms_max"):
        parsed({"OR": [{"user_id": str(i)} for i in range(11)]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["AND", "OR", "NOT", "user_id", "created_at", "metadata", "eq", "in"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused_as_an_invalid_filter(value: Any) -> None:
    try:
        parsed(value)
    except InvalidFilter as error:
        assert error.message and error.status == 400


def test_scope_ids_that_every_match_must_have_route_the_search() -> None:
    tree = parsed({"AND": [{"user_id": "ana"}, {"NOT": {"agent_id": "x"}}], "run_id": "r"})
    assert scope_of(tree) == Scope(user_id="ana", run_id="r")
    assert scope_of(parsed({"OR": [{"user_id": "ana"}, {"user_id": "bo"}]})) == Scope()
    assert scope_of(None) == Scope()
