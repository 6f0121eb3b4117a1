"""docs/client.md says of each option what the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from agentmem_client import Policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"


def test_every_option_of_the_policy_is_documented_with_its_default() -> None:
    documented: dict[str, str] = {}
    for line in PAGE.read_text().splitlines():
        names, _, rest = line.removeprefix("| ").partition(" | ")
        found = re.findall(r"`([a-z_]+)`", names)
        if found and line.startswith("| `") and rest:
            values = [value.strip() for value in rest.split(" | ")[0].split(",")]
            documented |= dict(zip(found, values, strict=False))
    in_words = {"attempt_share_max": "1/3", "unreachable_s_max": "the deadline"}
    in_words["answer_bytes_max"] = "256 MiB"
    for option in fields(Policy):
        expected = in_words.get(option.name, f"{option.default:g}")
        assert documented.get(option.name) == expected, option.name
