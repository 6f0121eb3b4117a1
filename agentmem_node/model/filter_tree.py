"""The filter tree, and what it means.

What the operators mean is written here once, for one value (`holds`), and used by both
evaluators: `matches` (one memory) and `agentmem_node.index.masks` (a column at a time).
`agentmem_node.model.filters` makes trees from JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.times import parse_time_ms

Operator = Literal[
    "eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "contains", "icontains", "exists"
]

SCOPE_FIELDS: Final = ("user_id", "agent_id", "app_id", "run_id")
TIME_FIELDS: Final = ("created_at", "updated_at", "expires_at")
METADATA_PREFIX: Final = "metadata."

# Stored where a memory has no such value. Only `exists: false`, `ne` and `nin` hold for it.
MISSING: Final = None


@dataclass(frozen=True, slots=True)
class Compare:
    field: str  # "user_id", "created_at", ..., "metadata.city"
    op: Operator
    value: Any  # times already as milliseconds since 1970 (int); `in` and `nin`: a tuple


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


def matches(tree: Filter, memory: Memory) -> bool:
    """Whether one memory passes."""
    if isinstance(tree, Compare):
        return holds(tree.op, field_value(memory, tree.field), tree.value)
    if isinstance(tree, And):
        return all(matches(part, memory) for part in tree.parts)
    if isinstance(tree, Or):
        return any(matches(part, memory) for part in tree.parts)
    return not matches(tree.part, memory)


def field_value(memory: Memory, field: str) -> Any:
    """What `field` names in a memory; times as milliseconds, MISSING where there is none."""
    if field.startswith(METADATA_PREFIX):
        return metadata_value(memory.metadata, field[len(METADATA_PREFIX) :])
    value = getattr(memory, field)
    if field in TIME_FIELDS and value is not None:
        return parse_time_ms(value, field)
    return value


def metadata_value(metadata: Mapping[str, Any], path: str) -> Any:
    """The value at `path`: a key that is literally so called, else one level per dot."""
    if path in metadata:
        return metadata[path]
    value: Any = metadata
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def holds(op: Operator, stored: Any, value: Any) -> bool:
    """Whether `stored op value`. Values of different kinds are unequal and have no order."""
    return _TESTS[op](stored, value)


def same(a: Any, b: Any) -> bool:
    """JSON equality: 1 equals 1.0, true equals only true, lists and objects by their members.

    >>> same(1, True), same(1, 1.0), same([1, {"a": None}], [1.0, {"a": None}])
    (False, True, True)
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and bool(a == b)


def scope_of(tree: Filter | None) -> Scope:
    """The scope ids that every match must have: `eq` at the top, or within ANDs.

    They route a search to a shard and make its statistics the owner's. The first of two
    different demands is taken; nothing can match both, and the filter itself still says so.
    """
    found: dict[str, str] = {}
    level: list[Filter] = [] if tree is None else [tree]
    while level:
        part = level.pop(0)
        if isinstance(part, And):
            level.extend(part.parts)
        elif isinstance(part, Compare) and part.op == "eq" and part.field in SCOPE_FIELDS:
            found.setdefault(part.field, part.value)
    return Scope(**found)


def _order(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compare(stored: Any, value: Any) -> bool:
        if isinstance(stored, bool) or isinstance(value, bool):
            return False
        if isinstance(stored, int | float) and isinstance(value, int | float):
            return test(stored, value)
        return isinstance(stored, str) and isinstance(value, str) and test(stored, value)

    return compare


def _in(stored: Any, values: Any) -> bool:
    if isinstance(stored, list) and any(same(s, v) for s in stored for v in values):
        return True
    return any(same(stored, v) for v in values)


def _eq(stored: Any, value: Any) -> bool:
    # A list of categories "is" work when it has work in it: what the bare form means to people.
    return _in(stored, (value,))


def _contains(stored: Any, value: Any) -> bool:
    if isinstance(stored, list):
        return any(same(s, value) for s in stored)
    return isinstance(stored, str) and isinstance(value, str) and value in stored


def _icontains(stored: Any, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    wanted = value.casefold()
    if isinstance(stored, list):
        return any(isinstance(s, str) and wanted in s.casefold() for s in stored)
    return isinstance(stored, str) and wanted in stored.casefold()


def _exists(stored: Any, value: Any) -> bool:
    # An empty list is what a memory without categories has.
    return (stored is not MISSING and stored != []) is value


_TESTS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "eq": _eq,
    "ne": lambda stored, value: not _eq(stored, value),
    "gt": _order(lambda a, b: a > b),
    "gte": _order(lambda a, b: a >= b),
    "lt": _order(lambda a, b: a < b),
    "lte": _order(lambda a, b: a <= b),
    "in": _in,
    "nin": lambda stored, value: not _in(stored, value),
    "contains": _contains,
    "icontains": _icontains,
    "exists": _exists,
}
