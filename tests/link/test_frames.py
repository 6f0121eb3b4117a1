"""Frames: whatever is cut into whatever pieces comes out as it went in, and garbage is refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import AgentMemError, InternalError, NotLeader
from agentmem_cluster.frames import BadFrame, FrameDecoder, encode_frame
from agentmem_cluster.link.wire import error_from_wire, error_to_wire

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(st.lists(VALUES, max_size=8), st.data())
def test_frames_survive_any_way_of_cutting_the_stream(values: list[Any], data: Any) -> None:
    stream = b"".join(encode_frame(value, 1 << 20) for value in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder = FrameDecoder(1 << 20)
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[start:end])
    assert got == values


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_any_bytes_are_values_or_a_bad_frame(pieces: list[bytes]) -> None:
    decoder = FrameDecoder(200)
    try:
        for piece in pieces:
            decoder.feed(piece)
    except BadFrame:
        pass


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadFrame):
        FrameDecoder(100).feed(struct.pack(">I", 101))
    with pytest.raises(ValueError, match="over the limit"):
        encode_frame(b"x" * 200, 100)


@pytest.mark.parametrize("value", [object(), 1 << 70, {"x": {1, 2}}])
def test_what_msgpack_does_not_know_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be a frame"):
        encode_frame(value, 100)


@given(VALUES)
def test_any_value_is_read_as_some_error(wire: Any) -> None:
    assert isinstance(error_from_wire(wire), AgentMemError)


@given(st.dictionaries(st.sampled_from(["code", "message", "hint", "details"]), VALUES))
def test_any_map_is_read_as_some_error(wire: Any) -> None:
    assert isinstance(error_from_wire(wire), AgentMemError)


def test_details_that_cannot_travel_are_left_out() -> None:
    error = NotLeader("no", leader="n2")
    error.details["handle"] = object()
    found = error_from_wire(error_to_wire(error))
    assert isinstance(found, NotLeader)
    assert found.details == {"leader": "n2"}
    assert type(error_from_wire({"code": "internal", "message": "x"})) is InternalError
