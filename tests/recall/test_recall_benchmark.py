"""The recall benchmark: what it reads, how it counts, what it says when the file is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.conversations import WrongForm, read  # noqa: E402
from benchmarks.recall_score import CUTS, mean, score  # noqa: E402


def sample() -> dict[str, Any]:
    """A conversation in the form of the data set, of our own making."""
    return {
        "sample_id": "talk-1",
        "conversation": {
            "speaker_a": "Ida",
            "speaker_b": "Omar",
            "session_1_date_time": "1:05 pm on 3 March, 2024",
            "session_1": [
                {"speaker": "Ida", "dia_id": "D1:1", "text": "My bees arrived."},
                {
                    "speaker": "Omar",
                    "dia_id": "D1:2",
                    "text": "Look!",
                    "blip_caption": "a photo of a hive",
                },
            ],
            "session_2_date_time": "9:30 am on 4 March, 2024",
            "session_2": [{"speaker": "Ida", "dia_id": "D2:1", "text": "No honey yet."}],
            "session_3_date_time": "9:30 am on 5 March, 2024",
        },
        "qa": [
            {"question": "Whose bees?", "evidence": ["D1:1"], "category": 4},
            {"question": "Honey?", "evidence": ["D1:1; D2:1", "D:1:2", "D"], "category": 1},
            {"question": "Nothing known?", "evidence": [], "category": 5},
            {"question": "A turn that is not there?", "evidence": ["D9:1"], "category": 4},
        ],
    }


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(document))
    return path


def test_turns_become_memories_with_speaker_caption_session_and_time(tmp_path: Path) -> None:
    (conversation,) = read(written(tmp_path, [sample()]))
    assert [t.content for t in conversation.turns] == [
        "Ida: My bees arrived.",
        "Omar: Look! [shares a photo of a hive]",
        "Ida: No honey yet.",
    ]
    assert [t.session for t in conversation.turns] == ["1", "1", "2"]
    assert conversation.turns[0].created_at == "2024-03-03T13:05:00Z"
    assert conversation.turns[0].created_at < conversation.turns[1].created_at


def test_evidence_is_found_however_it_was_written_and_questions_without_any_are_left_out(
    tmp_path: Path,
) -> None:
    (conversation,) = read(written(tmp_path, [sample()]))
    assert [(q.text, sorted(q.evidence)) for q in conversation.questions] == [
        ("Whose bees?", [0]),
        ("Honey?", [0, 1, 2]),
    ]


def without(*path: str) -> dict[str, Any]:
    document = sample()
    target = document
    for name in path[:-1]:
        target = target[name]
    del target[path[-1]]
    return document


@pytest.mark.parametrize(
    "document",
    [
        [],
        [1],
        {"memories": []},
        [without("conversation")],
        [without("qa")],
        [without("conversation", "session_2_date_time")],
        [{**sample(), "qa": [{"question": "x", "evidence": 3, "category": 1}]}],
        [{**sample(), "conversation": {}}],
    ],
)
def test_another_form_is_refused_with_a_message(tmp_path: Path, document: object) -> None:
    with pytest.raises(WrongForm, match=r"data\.json"):
        read(written(tmp_path, document))


def test_a_missing_file_ends_the_program_with_a_hint_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "recall.py", tmp_path / "none.json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "There is no file" in done.stderr and "CC BY-NC" in done.stderr
    assert "Traceback" not in done.stderr


def test_text_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(WrongForm, match="JSON"):
        read(path)


@given(st.permutations(range(30)), st.sets(st.integers(0, 40), min_size=1, max_size=8))
def test_recall_grows_with_k_and_the_reciprocal_rank_is_of_the_first_hit(
    ranked: list[int], evidence: set[int]
) -> None:
    result = score(ranked, evidence)
    assert list(result.recall) == sorted(result.recall)
    for k, recall in zip(CUTS, result.recall, strict=True):
        assert recall == len(evidence & set(ranked[:k])) / len(evidence)
    ranks = [i for i, found in enumerate(ranked, 1) if found in evidence]
    assert result.reciprocal_rank == (1 / min(ranks) if ranks else 0)


def test_every_question_counts_the_same() -> None:
    both = mean([score([1, 2], {1}), score([1, 2], {7, 8, 9})])
    assert both.recall[0] == 0.5 and both.reciprocal_rank == 0.5 and both.questions == 2
