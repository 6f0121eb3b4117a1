"""Conversations with questions about them, read from a file in the form of LoCoMo.

LoCoMo (Maharana et al., ACL 2024, github.com/snap-research/locomo) is licensed CC BY-NC 4.0: it is
evaluation data that nobody may ship with this project. The path is an argument, always.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}

_SESSION = re.compile(r"session_(\d+)")
_SESSION_TIME = "%I:%M %p on %d %B, %Y"
# "D8:6", but also "D8:6; D9:17" in one string and "D:11:26": the file was written by hand.
_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")


class WrongForm(Exception):
    """The file is not there or is not what this benchmark reads; the message says what is."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one person said: one memory."""

    session: str
    content: str
    created_at: str  # RFC 3339


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    category: int
    evidence: frozenset[int]  # positions of the turns that hold the answer


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]
    """Those whose evidence is known: a question without any cannot be scored."""


def read(path: Path) -> list[Conversation]:
    """Raises WrongForm, saying what is wrong with the file and where."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WrongForm(
            f"There is no file {path}. Name a file in the form of LoCoMo, such as locomo10.json of "
            "github.com/snap-research/locomo (CC BY-NC 4.0: for evaluation only)."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WrongForm(f"{path} cannot be read as JSON: {error}") from None
    samples = document if isinstance(document, list) else [document]
    if not samples:
        raise WrongForm(f"{path} holds no conversation.")
    conversations = []
    for number, sample in enumerate(samples):
        try:
            conversations.append(_conversation(sample, number))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WrongForm(
                f"{path}: conversation {number} is not in the form of LoCoMo "
                f"({type(error).__name__}: {error}). Expected a list of objects with "
                '"conversation" (session_1, session_1_date_time, ...) and "qa" '
                "(question, evidence, category)."
            ) from None
    return conversations


def _conversation(sample: Mapping[str, Any], number: int) -> Conversation:
    talk = sample["conversation"]
    turns: list[Turn] = []
    position: dict[tuple[int, int], int] = {}
    for session in _sessions(talk):
        begun = datetime.datetime.strptime(
            talk[f"session_{session}_date_time"].strip(), _SESSION_TIME
        )
        for said in talk[f"session_{session}"]:
            # A second apart: the file dates sessions only, and turns have an order.
            at = begun + datetime.timedelta(seconds=len(turns) % 3600)
            where = _EVIDENCE.fullmatch(said["dia_id"])
            if where is None:
                raise ValueError(f"dia_id {said['dia_id']!r}")
            position[int(where[1]), int(where[2])] = len(turns)
            turns.append(Turn(str(session), _text(said), f"{at.isoformat()}Z"))
    questions = []
    for asked in sample["qa"]:
        named = _EVIDENCE.findall(" ".join(asked["evidence"]))
        evidence = frozenset(
            position[place] for a, b in named if (place := (int(a), int(b))) in position
        )
        if evidence:
            questions.append(Question(str(asked["question"]), int(asked["category"]), evidence))
    if not turns or not questions:
        raise ValueError("no turns, or no question with evidence among them")
    return Conversation(
        str(sample.get("sample_id", f"conversation-{number}")), tuple(turns), tuple(questions)
    )


def _sessions(talk: Mapping[str, Any]) -> Iterator[int]:
    """Numbers of the sessions that were held, in order: some have a date and no words."""
    yield from sorted(
        int(match[1]) for key in talk if (match := _SESSION.fullmatch(key)) and talk[key]
    )


def _text(said: Mapping[str, Any]) -> str:
    """A turn as an application would store it: who, what, and what the picture shows."""
    caption = said.get("blip_caption")
    shown = f" [shares {caption}]" if caption else ""
    return f"{said['speaker']}: {said['text']}{shown}"
