"""Commands survive the wire, and no bytes can harm their decoder."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.model.commands import (
    COMMAND_OPS_MAX,
    VERSION_END,
    Add,
    Delete,
    Rejected,
    Revive,
    Update,
    Write,
    decode,
    encode_write,
)
from agentmem_node.model.times import TIME_MS_MAX, TIME_MS_MIN

times = st.integers(TIME_MS_MIN, TIME_MS_MAX)
ids = st.binary(min_size=16, max_size=16)
versions = st.integers(1, VERSION_END - 2)
optional_times = st.one_of(st.none(), times)
optional_bytes = st.one_of(st.none(), st.binary(max_size=40))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)

adds = st.builds(Add, ids, st.binary(max_size=40), optional_bytes, times, optional_times)
updates = st.builds(Update, ids, versions, st.binary(max_size=40), optional_bytes, optional_times)
deletes = st.builds(Delete, ids, st.one_of(st.none(), versions))
revivals = st.builds(
    Revive, ids, versions, st.binary(max_size=40), optional_bytes, times, optional_times
)
writes = st.builds(
    Write,
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=8),
    texts,
    times,
    st.lists(st.one_of(adds, updates, deletes, revivals), max_size=5).map(tuple),
    st.booleans(),
)
# Values that msgpack can carry, nested: the raw material of a hostile command.
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=20),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=8), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


@given(writes)
def test_a_command_decodes_to_what_was_encoded(write: Write) -> None:
    assert decode(encode_write(write)) == write


@given(writes)
def test_equal_commands_have_equal_bytes(write: Write) -> None:
    decoded = decode(encode_write(write))
    assert isinstance(decoded, Write)
    assert encode_write(decoded) == encode_write(write)


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_a_write_or_a_reason(data: bytes) -> None:
    assert isinstance(decode(data), Write | Rejected)


@given(st.lists(values, max_size=10))
def test_any_list_decodes_to_a_write_or_a_reason(row: list[Any]) -> None:
    assert isinstance(decode(msgpack.packb(row)), Write | Rejected)


@given(writes, st.integers(0, 7), values)
def test_a_field_of_any_value_gives_a_write_or_a_reason(
    write: Write, field: int, value: Any
) -> None:
    row = msgpack.unpackb(encode_write(write))
    row[field] = value
    decoded = decode(msgpack.packb(row))
    assert isinstance(decoded, Write | Rejected)
    if isinstance(decoded, Write):
        # What passed the checks has the types it says, down to bool against int.
        assert decode(encode_write(decoded)) == decoded


@given(writes, st.data())
def test_a_flipped_bit_gives_a_write_or_a_reason(write: Write, data: st.DataObject) -> None:
    command = bytearray(encode_write(write))
    bit = data.draw(st.integers(0, 8 * len(command) - 1))
    command[bit // 8] ^= 1 << (bit % 8)
    assert isinstance(decode(bytes(command)), Write | Rejected)


@pytest.mark.parametrize(
    "head",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 5000],
    ids=["a huge list", "a huge map", "huge bytes", "nested without end"],
)
def test_a_header_that_promises_too_much_is_refused_at_once(head: bytes) -> None:
    assert isinstance(decode(head), Rejected)


@pytest.mark.parametrize("at_ms", [TIME_MS_MIN - 1, TIME_MS_MAX + 1, True, 0.0, None])
def test_a_time_that_cannot_be_written_down_is_refused(at_ms: object) -> None:
    row = [1, 1, bytes(16), b"", "acme", at_ms, False, []]
    assert decode(msgpack.packb(row)) == Rejected("at_ms is not a time")


def test_more_operations_than_any_service_sends_are_refused() -> None:
    ops = [[3, bytes(16), None]] * (COMMAND_OPS_MAX + 1)
    row = [1, 1, bytes(16), b"", "acme", 0, False, ops]
    assert isinstance(decode(msgpack.packb(row)), Rejected)


def test_a_value_that_cannot_travel_is_refused_when_it_is_encoded() -> None:
    add = Add(bytes(16), b"{}", None, 1 << 70, None)
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_write(Write(bytes(16), b"", "acme", 0, (add,)))
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_write(Write(bytes(16), b"", "\ud800", 0, ()))
