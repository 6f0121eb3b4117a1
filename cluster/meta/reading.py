"""Checks of values that another node, perhaps of another version, has written."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

TEXT_CHARS_MAX = 1_024
_INTEGER_END = 1 << 63


def read_fields(kind: type[Any], wire: Any) -> dict[str, Any]:
    if not isinstance(wire, dict):
        raise ValueError(f"{kind.__name__} is not a map")
    values = {}
    for spec in fields(kind):
        value = wire.get(spec.name)
        if value is None and spec.default is not MISSING:
            continue
        check = integer if spec.type == "int" else any_text
        values[spec.name] = check(value, f"{kind.__name__}.{spec.name}")
    return values


def exactly(values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise ValueError(f"{count} values were expected, not {len(values)}")
    return values


def text(value: Any, name: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= chars_max:
        raise ValueError(f"{name} is not a text of 1 to {chars_max} characters")
    return value


def any_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
        raise ValueError(f"{name} is not a text of at most {TEXT_CHARS_MAX} characters")
    return value


def integer(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < _INTEGER_END:
        raise ValueError(f"{name} is not an integer of 0 or more")
    return value
