"""Conversations written for this project: several months of six people's lives, and questions.

`conversations.jsonl` holds one turn a line, as `agentmem add --file` takes it: the people are
invented, the turns have dates, sessions (`run_id`), typos and minds that change. In
`questions.jsonl`, `expected` are the numbers of the lines that answer, counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """A search, and the positions in `conversations()` of the memories that answer it."""

    query: str
    user_id: str
    expected: tuple[int, ...]


def conversations() -> list[dict[str, Any]]:
    """The fields of an add, one a turn, in the order of the file."""
    return list(_lines("conversations.jsonl"))


def questions() -> list[Question]:
    """Questions that a memory should answer."""
    return [
        Question(line["query"], line["user_id"], tuple(line["expected"]))
        for line in _lines("questions.jsonl")
    ]


def _lines(name: str) -> Iterator[dict[str, Any]]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    for line in text.splitlines():
        yield json.loads(line)
