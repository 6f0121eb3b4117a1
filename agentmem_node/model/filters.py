"""The filter tree: what `filters` in a request means, after it was checked.

JSON form: a bare object is an AND of its members; `AND` and `OR` take lists, `NOT` a filter or
a list; any other key is a field, with a bare value (`eq`), or an object of operators:

    {"AND": [{"user_id": "ana"}, {"created_at": {"gte": "2026-01-01"}},
             {"NOT": {"categories": {"contains": "work"}}}, {"metadata.city": {"in": ["Oslo"]}}]}

Fields: user_id agent_id app_id run_id created_at updated_at expires_at memory_type importance
categories content id, and metadata.KEY (nested with dots). `{"metadata": {"city": "Oslo"}}`
is the same as `{"metadata.city": "Oslo"}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Operator = Literal[
    "eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists"
]


@dataclass(frozen=True, slots=True)
class Compare:
    field: str  # "user_id", "created_at", ..., "metadata.city"
    op: Operator
    value: Any  # times already as milliseconds since 1970 (int)


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Filter


Filter = Compare | And | Or | Not
