"""Frames from a peer are checked by shape and range before anything believes them."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.frames import (
    HEAD,
    NUMBER_MAX,
    Kind,
    bursts,
    pack_terms,
    unpack_entries,
    well_formed,
)

BOOT = b"12345678"
FRAMES: list[list[Any]] = [
    [Kind.APPEND, "g", 1, BOOT, 3, 4, 2, 3, 0, [[2, 1], [3, 1]], [b"x", b"y"]],
    [Kind.APPENDED, "g", 1, BOOT, 3, BOOT, 6],
    [Kind.REFUSED, "g", 1, BOOT, 3, BOOT, 6, 5],
    [Kind.ASK_VOTE, "g", 1, BOOT, 3, 6, 2, False],
    [Kind.VOTE, "g", 1, BOOT, 3, BOOT],
    [Kind.TAKE_OVER, "g", 1, BOOT, 3],
    [Kind.ASK_PREVOTE, "g", 1, BOOT, 3, 1, 6, 2],
    [Kind.PREVOTE, "g", 1, BOOT, 3, BOOT, 1, True],
    [Kind.PROBE, "g", 1, BOOT, 3, 1],
    [Kind.PROBED, "g", 1, BOOT, 3, BOOT, 1],
    [Kind.ASK_READ, "g", 1, BOOT, 3, 1],
    [Kind.READ_AT, "g", 1, BOOT, 3, BOOT, 1, -1],
    [Kind.TERM_IS_OLD, "g", 1, BOOT, 3],
    [Kind.RESEED, "g", 1, BOOT, 3, 9],
]


def wire(frame: list[Any]) -> Any:
    return msgpack.unpackb(msgpack.packb(frame))


def test_the_examples_show_every_kind() -> None:
    assert {frame[0] for frame in FRAMES} == set(Kind)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: Kind(frame[0]).name)
def test_every_kind_passes_over_the_wire(frame: list[Any]) -> None:
    assert well_formed(wire(frame))


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: Kind(frame[0]).name)
@pytest.mark.parametrize("number", [NUMBER_MAX, 2**63, 2**64 - 1, -2, True, 1.0, None, "1", b"1"])
def test_a_number_that_no_honest_peer_counts_to_is_refused(frame: list[Any], number: Any) -> None:
    places = [at for at in range(4, len(frame)) if type(frame[at]) is int]
    for at in places:
        changed = [*frame]
        changed[at] = number
        assert not well_formed(wire(changed)), f"field {at}"


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: Kind(frame[0]).name)
def test_a_frame_with_a_field_too_few_or_too_many_is_refused(frame: list[Any]) -> None:
    assert not well_formed(wire(frame[:-1]))
    assert not well_formed(wire([*frame, 0]))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.sampled_from(FRAMES), st.integers(0, 11), values)
def test_whatever_stands_in_a_field_the_check_answers(
    frame: list[Any], at: int, value: Any
) -> None:
    changed = [*frame]
    changed[min(at, len(frame) - 1)] = value
    assert well_formed(changed) in (True, False)


@given(st.integers(0, 1_000), st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=3))))
def test_entries_unpack_to_what_was_packed(previous: int, steps: list[tuple[int, bytes]]) -> None:
    entries, term = [], 1
    for at, (rise, command) in enumerate(steps):
        term += rise
        entries.append(Entry(previous + 1 + at, term, command))
    terms = pack_terms(entries)
    assert unpack_entries(previous, terms, [entry.command for entry in entries]) == entries


@given(st.lists(st.lists(st.integers(0, 50), max_size=3), min_size=1), st.integers(1, 100))
def test_bursts_keep_every_frame_in_order_and_only_a_single_frame_is_too_large(
    sizes: list[list[int]], bytes_max: int
) -> None:
    frames = [[*FRAMES[0][: HEAD + 5], [bytes(size) for size in each]] for each in sizes]
    parts = list(bursts(frames, bytes_max))
    assert [frame for part in parts for frame in part] == frames
    for part in parts:
        carried = [sum(map(len, frame[-1])) for frame in part]
        assert sum(carried) <= max(bytes_max, *carried)
