"""Consistency tokens survive the round trip, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import InvalidField
from agentmem_node.service.tokens import decode_token, encode_token, merge_tokens

SHARDS = st.integers(0, 99_999).map(lambda n: f"s{n:02d}")
TOKENS = st.dictionaries(SHARDS, st.integers(0, 10**18 - 1), max_size=20)


@given(TOKENS)
def test_a_token_says_what_it_was_made_of(applied: dict[str, int]) -> None:
    assert decode_token(encode_token(applied)) == applied


@given(TOKENS, TOKENS)
def test_merging_keeps_the_later_index_of_each_shard(a: dict[str, int], b: dict[str, int]) -> None:
    merged = dict(a)
    merge_tokens(b, merged)
    assert merged == {s: max(a.get(s, -1), b.get(s, -1)) for s in {**a, **b}}


@pytest.mark.parametrize(
    "text", ["x", "s01", "s01:", "s01:-1", "s1:2", "s01:1;s02:2", "s01:1 ", "s01:" + "9" * 19]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match="token"):
        decode_token(text)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        applied = decode_token(text)
    except InvalidField:
        return
    assert all(index >= 0 for index in applied.values())
