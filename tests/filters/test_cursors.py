"""A cursor comes back as it was, and only to the request that it was made for."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import InvalidCursor
from agentmem_node.model.cursors import (
    decode_list_cursor,
    decode_search_cursor,
    encode_list_cursor,
    encode_search_cursor,
    fingerprint,
)

ids = st.binary(min_size=16, max_size=16)


@given(st.floats(0, 1), ids, st.binary(min_size=8, max_size=8))
def test_a_search_cursor_round_trips(score: float, key: bytes, request: bytes) -> None:
    text = encode_search_cursor((score, key), request)
    assert text.isascii() and "=" not in text
    assert decode_search_cursor(text, request) == (score, key)


@given(st.integers(-(2**63), 2**63 - 1), ids)
def test_a_list_cursor_round_trips(created_ms: int, key: bytes) -> None:
    assert decode_list_cursor(encode_list_cursor((created_ms, key))) == (created_ms, key)


def test_the_cursor_of_another_request_is_refused() -> None:
    text = encode_search_cursor((0.5, bytes(16)), fingerprint(b"tea"))
    with pytest.raises(InvalidCursor, match="another request"):
        decode_search_cursor(text, fingerprint(b"coffee"))
    with pytest.raises(InvalidCursor):
        decode_list_cursor(text)


@given(
    st.one_of(
        st.text(max_size=60),
        st.binary(max_size=50).map(lambda b: base64.urlsafe_b64encode(b).decode()),
    )
)
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    for decode in (lambda t: decode_search_cursor(t, bytes(8)), decode_list_cursor):
        try:
            decode(text)
        except InvalidCursor as error:
            assert error.status == 400


@given(st.floats(0, 1), ids)
def test_a_search_cursor_that_says_nan_is_refused(score: float, key: bytes) -> None:
    text = encode_search_cursor((float("nan"), key), bytes(8))
    with pytest.raises(InvalidCursor):
        decode_search_cursor(text, bytes(8))


def test_requests_differ_by_any_part() -> None:
    assert fingerprint(b"a", b"bc") != fingerprint(b"ab", b"c")
