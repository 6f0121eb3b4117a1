"""Settings as the text of a node.toml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(heading: str, values: Mapping[str, Any]) -> str:
    """`{"raft.heartbeat_ms": 50}` as TOML, section by section. None is left out."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if value is not None:
            sections.setdefault(section, {})[key] = value
    lines = [f"# {heading}"]
    for section, fields in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {_value(v)}" for key, v in fields.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        given = {key: item for key, item in value.items() if item is not None}
        return "{ " + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in given.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # A string, number or boolean is written the same in TOML as in JSON.
    return json.dumps(value)
