"""Memories from a file: a user's own text, or JSON Lines.

JSON Lines (a first line that begins with `{`): an object a line, with the fields of an add:
`content` or `messages`, and any of `user_id`, `metadata`, ... What `agentmem list --jsonl`
prints is such a file. Fields that only a stored memory has (id, version, hash, updated_at) are
left out when it is read again.

Text: one memory a paragraph when the file has empty lines, else one a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

# Of agentmem_node.model.requests.AddRequest; a test keeps them equal.
ADD_FIELDS = frozenset(
    {
        "content",
        "messages",
        "user_id",
        "agent_id",
        "app_id",
        "run_id",
        "metadata",
        "memory_type",
        "importance",
        "categories",
        "created_at",
        "expires_at",
        "vector",
        "infer",
    }
)
STORED_FIELDS = frozenset({"id", "version", "hash", "updated_at", "score", "legs"})
_TEXT_BYTES_MAX = 256 * 1024 * 1024


class InputError(Exception):
    """A file cannot be taken; the message names the line."""


def read_memories(file: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """The memories of a file, one by one. Raises InputError."""
    try:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("{"):
            yield from _json_lines(first, file, name)
        else:
            rest = file.read(_TEXT_BYTES_MAX)
            if file.read(1):
                raise InputError(
                    f"{name}: a text file may have {_TEXT_BYTES_MAX >> 20} MiB; split it, or "
                    "write it as JSON Lines, which is read line by line."
                )
            _refuse_json_array(first + rest, name)
            yield from ({"content": text} for text in _texts(first + rest))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason}.") from error


def _json_lines(first: str, file: TextIO, name: str) -> Iterator[dict[str, Any]]:
    def lines() -> Iterator[str]:
        yield first
        yield from file

    number = 0
    for line in lines():
        if not line.strip():
            continue
        number += 1
        where = f"{name}, object {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise InputError(f"{where} is not a JSON object.")
        unknown = sorted(set(value) - ADD_FIELDS - STORED_FIELDS)
        if unknown:
            raise InputError(
                f"{where} has the field {unknown[0]!r}, which no memory has. Fields: "
                f"{', '.join(sorted(ADD_FIELDS))}. Put your own under `metadata`."
            )
        fields = {key: v for key, v in value.items() if key in ADD_FIELDS and v is not None}
        if "content" not in fields and "messages" not in fields:
            raise InputError(f"{where} has neither `content` nor `messages`.")
        yield fields


def _refuse_json_array(text: str, name: str) -> None:
    """Objects in an array would become the text of one memory, which nobody wants."""
    if not text.lstrip().startswith("["):
        return
    try:
        value = json.loads(text)
    except ValueError:
        return  # a text that begins with a bracket
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        raise InputError(
            f"{name} is a JSON array. Write an object a line instead: jq -c '.[]' {name}"
        )


def _texts(text: str) -> Iterator[str]:
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    if "" not in "\n".join(lines).strip("\n").split("\n"):
        yield from (line for line in lines if line)
        return
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line:
            paragraph.append(line)
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
