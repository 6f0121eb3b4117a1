"""A user's own files become memories, or a message that names the line."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.cli.fields import MEMORY_TYPES, metadata_of
from agentmem_node.cli.inputs import ADD_FIELDS, InputError, read_memories
from agentmem_node.model.memory import MemoryType
from agentmem_node.model.requests import AddRequest


def contents(text: str) -> list[str]:
    return [item["content"] for item in read_memories(io.StringIO(text), "notes.txt")]


def test_without_empty_lines_every_line_is_a_memory() -> None:
    assert contents("\ufeffone\ntwo  \n\tthree\n\n") == ["one", "two", "three"]


def test_with_empty_lines_every_paragraph_is_a_memory() -> None:
    assert contents("one\nstill one\n\n\ntwo\n") == ["one still one", "two"]


def test_a_text_may_begin_with_a_bracket() -> None:
    assert contents("[x] buy tea\n[ ] call Ana\n") == ["[x] buy tea", "[ ] call Ana"]


def test_an_empty_file_has_no_memories() -> None:
    assert contents("") == []
    assert contents("\n \n") == []


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1)))
def test_every_word_of_a_text_is_in_one_memory_in_order(lines: list[str]) -> None:
    text = "word\n" + "\n".join(lines)
    found = contents(text)
    assert " ".join(found).split() == text.removeprefix("\ufeff").split()
    assert all(item.strip() for item in found)


@given(st.lists(st.fixed_dictionaries({"content": st.text(), "user_id": st.text()}), min_size=1))
def test_json_lines_come_back_as_they_were_written(items: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(item) + "\n" for item in items)
    assert list(read_memories(io.StringIO(text), "notes.jsonl")) == items


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"content": "a"}\n{"content": \n', "object 2 is not JSON"),
        ('{"content": "a"}\n[1]\n', "object 2 is not a JSON object"),
        ('{"contents": "a"}\n', "'contents'"),
        ('{"user_id": "ana"}\n', "neither `content` nor `messages`"),
        ('[{"content": "a"},\n {"content": "b"}]\n', "is a JSON array"),
    ],
)
def test_a_bad_object_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(read_memories(io.StringIO(text), "notes.jsonl"))


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InputError, match="UTF-8"):
        list(read_memories(io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"), "notes.txt"))


def test_the_fields_are_those_of_the_api() -> None:
    assert frozenset(AddRequest.__struct_fields__) == ADD_FIELDS
    assert MemoryType.__args__ == MEMORY_TYPES  # type: ignore[attr-defined]


def test_metadata_values_are_json_where_they_can_be_and_text_elsewhere() -> None:
    assert metadata_of(("n=3", "city=Oslo", '{"a": {"b": 1}}', "url=http://x?a=b")) == {
        "n": 3,
        "city": "Oslo",
        "a": {"b": 1},
        "url": "http://x?a=b",
    }
