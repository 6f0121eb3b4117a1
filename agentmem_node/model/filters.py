"""Filters as users write them: from the JSON form to a tree, with every mistake named.

JSON form: a bare object is an AND of its members; `AND` and `OR` take lists, `NOT` a filter or
a list (none of them); any other key is a field, with a bare value (`eq`), or an object of
operators, all of which must hold:

    {"AND": [{"user_id": "ana"}, {"created_at": {"gte": "2026-01-01"}},
             {"NOT": {"categories": {"contains": "work"}}}, {"metadata.city": {"in": ["Oslo"]}}]}

Fields: user_id agent_id app_id run_id created_at updated_at expires_at memory_type importance
categories content id, and metadata.KEY (nested with dots). `{"metadata": {"city": "Oslo"}}`
is the same as `{"metadata.city": "Oslo"}`. The value `"*"` of a scope id means "any", null
means "none".
"""

from __future__ import annotations

import math
from typing import Any, Final

from agentmem_cluster.errors import InvalidField, InvalidFilter
from agentmem_node.model.filter_tree import (
    METADATA_PREFIX,
    SCOPE_FIELDS,
    TIME_FIELDS,
    And,
    Compare,
    Filter,
    Not,
    Operator,
    Or,
    matches,
    scope_of,
)
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import MemoryType
from agentmem_node.model.times import parse_time_ms

__all__ = [
    "And",
    "Compare",
    "Filter",
    "Not",
    "Operator",
    "Or",
    "matches",
    "parse_filter",
    "scope_of",
]

_EQUAL: Final[tuple[Operator, ...]] = ("eq", "ne", "in", "nin")
_ORDER: Final[tuple[Operator, ...]] = ("gt", "gte", "lt", "lte")
_PART: Final[tuple[Operator, ...]] = ("contains", "icontains")
_ANY: Final[tuple[Operator, ...]] = (*_EQUAL, *_ORDER, *_PART, "exists")

OPERATORS: Final[dict[str, tuple[Operator, ...]]] = {
    **dict.fromkeys(SCOPE_FIELDS, (*_EQUAL, *_PART, "exists")),
    **dict.fromkeys(TIME_FIELDS, (*_EQUAL, *_ORDER, "exists")),
    "memory_type": _EQUAL,
    "importance": (*_EQUAL, *_ORDER),
    "categories": (*_EQUAL, *_PART, "exists"),
    "content": (*_EQUAL, *_PART),
    "id": _EQUAL,
}
# What Mem0's clients call them.
_ALIASES: Final = {
    "timestamp": "created_at",
    "expiration_date": "expires_at",
    "memory_ids": "id",
    "keywords": "content",
    "text": "content",
}
# Far beyond any importance; a JSON integer may have hundreds of digits and fit no float.
_NUMBER_MAX: Final = 1e9
_LOGIC: Final = ("AND", "OR", "NOT")
_MEMORY_TYPES: Final[tuple[str, ...]] = MemoryType.__args__  # type: ignore[attr-defined]


def parse_filter(value: Any, limits: Limits) -> Filter | None:
    """The tree of `filters`; None for an empty object. Raises InvalidFilter.

    >>> parse_filter({"user_id": "ana"}, Limits())
    Compare(field='user_id', op='eq', value='ana')
    """
    if value == {}:
        return None
    return _Parser(limits).filter(value, depth=1)


class _Parser:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._terms = 0

    def filter(self, value: Any, depth: int) -> Filter:
        if depth > self._limits.filter_depth_max:
            raise InvalidFilter(
                f"`filters` is nested more than {self._limits.filter_depth_max} levels deep "
                "(limits.filter_depth_max).",
                hint="Flatten it: an object is already an AND of its members.",
            )
        if not isinstance(value, dict) or not value:
            raise InvalidFilter(
                f"A filter must be a non-empty object, not {_shown(value)}.",
                hint='For example {"user_id": "ana", "created_at": {"gte": "2026-01-01"}}.',
            )
        parts: list[Filter] = []
        for key, member in value.items():
            if key in _LOGIC:
                parts.append(self._logic(key, member, depth))
            elif key == "metadata":
                parts.extend(self._metadata(member))
            else:
                parts.extend(self._field(key, member))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _logic(self, key: str, member: Any, depth: int) -> Filter:
        if key == "NOT" and isinstance(member, dict):
            member = [member]
        if not isinstance(member, list) or not member:
            takes = (
                "a filter or a non-empty list of filters"
                if key == "NOT"
                else "a non-empty list of filters"
            )
            raise InvalidFilter(f"`{key}` takes {takes}, not {_shown(member)}.", key=key)
        parts = tuple(self.filter(part, depth + 1) for part in member)
        if key == "AND":
            return parts[0] if len(parts) == 1 else And(parts)
        either = parts[0] if len(parts) == 1 else Or(parts)
        return either if key == "OR" else Not(either)

    def _metadata(self, member: Any) -> list[Filter]:
        if not isinstance(member, dict) or not member:
            raise InvalidFilter(
                f"`metadata` takes an object of keys, not {_shown(member)}.",
                hint='For example {"metadata": {"city": "Oslo"}} or {"metadata.city": "Oslo"}.',
                key="metadata",
            )
        return [
            part
            for key, value in member.items()
            for part in self._field(METADATA_PREFIX + key, value)
        ]

    def _field(self, key: str, member: Any) -> list[Filter]:
        field = _ALIASES.get(key, key)
        if field.startswith(METADATA_PREFIX) and len(field) > len(METADATA_PREFIX):
            allowed = _ANY
        elif field in OPERATORS:
            allowed = OPERATORS[field]
        else:
            allowed_keys = [*_LOGIC, *OPERATORS, "metadata.KEY"]
            raise InvalidFilter(
                f"Unknown filter key {_shown(key)}.",
                hint=f"Allowed: {', '.join(allowed_keys)}. A key of your own metadata is "
                f"written metadata.{key[:64]}.",
                key=key,
                allowed=allowed_keys,
            )
        if key == "memory_ids" and isinstance(member, list):
            member = {"in": member}
        if key == "keywords" and not isinstance(member, dict):
            member = {"contains": member}
        if not isinstance(member, dict):
            return [self._compare(key, field, "eq", member)]
        if not member:
            raise InvalidFilter(
                f"`{key}` has an empty object.",
                hint=f"Give a value, or operators: {', '.join(allowed)}.",
                key=key,
            )
        parts = []
        for op, value in member.items():
            if op not in allowed:
                raise InvalidFilter(
                    f"`{key}` does not know the operator {_shown(op)}.",
                    hint=f"Allowed for {field}: {', '.join(allowed)}.",
                    key=key,
                    allowed=list(allowed),
                )
            parts.append(self._compare(key, field, op, value))
        return parts

    def _compare(self, key: str, field: str, op: Operator, value: Any) -> Filter:
        self._count(1)
        if op == "exists":
            if not isinstance(value, bool):
                raise InvalidFilter(f"`{key}.exists` takes true or false.", key=key)
            return Compare(field, "exists", value)
        if op in ("in", "nin"):
            if not isinstance(value, list) or not value:
                raise InvalidFilter(
                    f"`{key}.{op}` takes a non-empty list, not {_shown(value)}.", key=key
                )
            self._count(len(value) - 1)
            if field in SCOPE_FIELDS and "*" in value:
                return Compare(field, "exists", op == "in")
            return Compare(field, op, tuple(self._value(key, field, v) for v in value))
        if op in ("eq", "ne") and (value is None or (value == "*" and field in SCOPE_FIELDS)):
            # "*" is any, null is none.
            return self._none(key, field, (op == "eq") is (value is not None))
        if op in _PART:
            if not isinstance(value, str) and not (
                op == "contains" and field.startswith(METADATA_PREFIX)
            ):
                raise InvalidFilter(f"`{key}.{op}` takes a text, not {_shown(value)}.", key=key)
            return Compare(field, op, value)
        checked = self._value(key, field, value)
        if op in _ORDER and (
            isinstance(checked, bool) or not isinstance(checked, int | float | str)
        ):
            raise InvalidFilter(
                f"`{key}.{op}` takes a number or a text, not {_shown(value)}.", key=key
            )
        return Compare(field, op, checked)

    def _none(self, key: str, field: str, exists: bool) -> Filter:
        if "exists" not in OPERATORS.get(field, ("exists",)):
            raise InvalidFilter(f"`{key}` is never null.", key=key)
        return Compare(field, "exists", exists)

    def _value(self, key: str, field: str, value: Any) -> Any:
        """One checked value of `field`; times become milliseconds."""
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidFilter(f"`{key}` compares with NaN or infinity.", key=key)
        if field.startswith(METADATA_PREFIX):
            return value
        if field in TIME_FIELDS:
            return _time(key, value)
        if field == "importance":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or abs(value) > _NUMBER_MAX:
                raise InvalidFilter(
                    f"`{key}` compares with a number of 0 to 1, not {_shown(value)}.", key=key
                )
            return float(value)
        if not isinstance(value, str):
            raise InvalidFilter(f"`{key}` compares with a text, not {_shown(value)}.", key=key)
        if field == "memory_type" and value not in _MEMORY_TYPES:
            raise InvalidFilter(
                f"`{key}` does not know the type {_shown(value)}.",
                hint=f"Allowed: {', '.join(_MEMORY_TYPES)}.",
                key=key,
                allowed=list(_MEMORY_TYPES),
            )
        return value.lower() if field == "id" else value

    def _count(self, terms: int) -> None:
        self._terms += terms
        if self._terms > self._limits.filter_terms_max:
            raise InvalidFilter(
                f"`filters` has more than {self._limits.filter_terms_max} comparisons and values "
                "(limits.filter_terms_max).",
                hint="Ask in several searches.",
            )


def _time(key: str, value: Any) -> int:
    # A number is seconds since 1970, as Mem0's `timestamp` is.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12:
        return round(value * 1000)
    if not isinstance(value, str):
        raise InvalidFilter(
            f"`{key}` compares with a time, not {_shown(value)}.",
            hint="Write 2026-01-31T09:30:00Z (RFC 3339), a date, or seconds since 1970.",
            key=key,
        )
    try:
        return parse_time_ms(value, key)
    except InvalidField as error:
        raise InvalidFilter(error.message, hint=error.hint, key=key) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
