"""Ids are UUIDs that say when and where, and sort by time."""

from __future__ import annotations

import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import InvalidField
from agentmem_node.model.ids import (
    SLOTS,
    format_id,
    new_id,
    parse_id,
    slot_of_id,
    time_of_id,
)

times = st.integers(0, (1 << 48) - 1)
slots = st.integers(0, SLOTS - 1)


class Dice:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def random(self) -> float:
        return self._random.random()

    def token(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)


@given(times, slots, st.integers())
def test_an_id_says_its_time_and_its_slot(ms: int, slot: int, seed: int) -> None:
    key = new_id(ms, slot, Dice(seed))
    assert len(key) == 16
    assert time_of_id(key) == ms
    assert slot_of_id(key) == slot


@given(times, slots, st.integers())
def test_an_id_is_a_uuid_of_version_8(ms: int, slot: int, seed: int) -> None:
    read = uuid.UUID(bytes=new_id(ms, slot, Dice(seed)))
    assert (read.version, read.variant) == (8, uuid.RFC_4122)


@given(st.lists(st.tuples(times, slots), min_size=2, max_size=9, unique_by=lambda t: t[0]))
def test_ids_sort_by_time_whatever_their_slot(drawn: list[tuple[int, int]]) -> None:
    dice = Dice(0)
    keys = [new_id(ms, slot, dice) for ms, slot in drawn]
    assert [time_of_id(key) for key in sorted(keys)] == sorted(ms for ms, _ in drawn)
    texts = [format_id(key) for key in keys]
    assert sorted(texts) == [format_id(key) for key in sorted(keys)]


def test_ids_of_one_millisecond_and_slot_differ() -> None:
    dice = Dice(1)
    assert len({new_id(5, 5, dice) for _ in range(10_000)}) == 10_000


@given(st.binary(min_size=16, max_size=16))
def test_a_formatted_id_parses_back_in_every_usual_spelling(key: bytes) -> None:
    text = format_id(key)
    assert text == str(uuid.UUID(bytes=key))
    for spelling in (
        text,
        text.upper(),
        key.hex(),
        f"{{{text}}}",
        f"urn:uuid:{text}",
    ):
        assert parse_id(spelling) == key


@given(st.text(max_size=50))
def test_a_text_that_is_no_uuid_is_refused_by_name(text: str) -> None:
    try:
        key = parse_id(text, "memory_id")
    except InvalidField as error:
        assert "memory_id" in error.message
        assert error.details["field"] == "memory_id"
    else:
        assert uuid.UUID(text).bytes == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0196e4a17c008a3f9b1cd2e3f4a5b6c",
        "0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7 ",
        "{0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7",
        "0196e4a1-7c008-a3f-9b1c-d2e3f4a5b6c7",
        "٠196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7",
    ],
)
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(InvalidField):
        parse_id(text)


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_a_slot_beyond_the_last_is_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="slot"):
        new_id(0, slot, Dice(0))


@pytest.mark.parametrize("ms", [-5, 1 << 60])
def test_a_clock_out_of_range_still_gives_an_id(ms: int) -> None:
    assert len(new_id(ms, 0, Dice(0))) == 16
