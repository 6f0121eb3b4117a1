"""Filters as masks: which rows of a block may be ranked at all, decided before ranking.

Columns of few distinct values (ids, types, importance, categories, metadata) are tested once a
distinct value; times are compared a column at a time. What the operators mean, for both, is said
in `agentmem_node.model.filter_tree`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from agentmem_cluster.errors import InvalidField
from agentmem_node.index.block import Block
from agentmem_node.index.columns import NEVER_MS, Bools, Coded, Ints
from agentmem_node.index.derived import ReadMemory
from agentmem_node.model.filter_tree import (
    METADATA_PREFIX,
    SCOPE_FIELDS,
    And,
    Compare,
    Filter,
    Or,
    holds,
)
from agentmem_node.model.ids import format_id, parse_id
from agentmem_node.model.memory import Scope

# Texts read for one filter rather than making a column of it.
_READ_ROWS_MAX: Final = 256


def allowed_rows(
    block: Block, scope: Scope, owner: str | None, tree: Filter | None, now_ms: int,
    read: ReadMemory,
) -> Bools | None:  # fmt: skip
    """Rows that may be ranked; None: all but row 0.

    `owner`: whose block it is, so that what it has in common need not be tested again.
    """
    columns = block.columns
    n = columns.n
    mask: Bools | None = None
    if columns.live != n - 1:
        mask = columns.is_live[:n]
    if columns.expires_ms_min <= now_ms:
        assert columns.expires_ms is not None
        mask = _both(mask, columns.expires_ms[:n] > now_ms)
    for field in SCOPE_FIELDS:
        value = getattr(scope, field)
        if value is None or (field == "user_id" and owner == f"user:{value}"):
            continue
        column = columns.coded[field]
        code = column.find(value)
        mask = _both(
            mask, np.zeros(n, dtype=np.bool_) if code is None else column.codes[:n] == code
        )
    if tree is not None:
        within = np.ones(n, dtype=np.bool_) if mask is None else mask.copy()
        within[0] = False
        mask = _Evaluator(block, read).mask(tree, within)
    return mask


class _Evaluator:
    """`mask(tree, within)`: the rows of `within` that pass. Never looks at other rows, so that
    the costly tests (content is read from the store) come to few."""

    def __init__(self, block: Block, read: ReadMemory) -> None:
        self._block = block
        self._read = read

    def mask(self, tree: Filter, within: Bools) -> Bools:
        if isinstance(tree, Compare):
            return self._compare(tree, within)
        if isinstance(tree, And):
            for part in sorted(tree.parts, key=_cost):
                within = self.mask(part, within)
            return within
        if isinstance(tree, Or):
            found: Bools = np.zeros(len(within), dtype=np.bool_)
            for part in sorted(tree.parts, key=_cost):
                found |= self.mask(part, within & ~found)
            return found
        return _and(within, ~self.mask(tree.part, within))

    def _compare(self, test: Compare, within: Bools) -> Bools:
        columns = self._block.columns
        n = len(within)
        field = test.field
        if field in columns.coded:
            return _and(within, _tested(columns.coded[field], test, n))
        if field.startswith(METADATA_PREFIX):
            column = self._block.derived.get(field[len(METADATA_PREFIX) :], self._read)
            return _and(within, _tested(column, test, n))
        if field == "content":
            return self._content(test, within)
        if field == "id":
            return _and(within, self._ids(test))
        if field == "created_at":
            return _and(within, _numbers(columns.created_ms[:n], test))
        if field == "updated_at":
            return _and(within, _numbers(columns.updated_ms[:n], test))
        if field == "expires_at":
            return self._expires(test, within)
        raise AssertionError(f"a filter on {field} passed the parser")

    def _content(self, test: Compare, within: Bools) -> Bools:
        derived = self._block.derived
        if not derived.is_complete(test) and np.count_nonzero(within) <= _READ_ROWS_MAX:
            rows = within.nonzero()[0]
            found: Bools = np.zeros(len(within), dtype=np.bool_)
            found[rows] = [
                holds(test.op, self._read(doc)["content"], test.value)
                for doc in self._block.columns.docs(rows)
            ]
            return found
        column = derived.get(test, self._read)
        return _and(within, column.codes[: len(within)] == column.code(True, True))

    def _expires(self, test: Compare, within: Bools) -> Bools:
        times = self._block.columns.expires_ms
        n = len(within)
        is_set: Bools = np.zeros(n, dtype=np.bool_)
        passed = is_set
        if times is not None:
            is_set = times[:n] != NEVER_MS
            passed = is_set if test.op == "exists" else _numbers(times[:n], test)
        if test.op == "exists":
            return _and(within, is_set == test.value)
        if test.op in ("ne", "nin"):
            return _and(within, ~is_set | passed)
        return _and(within, is_set & passed)

    def _ids(self, test: Compare) -> Bools:
        columns = self._block.columns
        n = columns.n
        found: Bools = np.zeros(n, dtype=np.bool_)
        for text in test.value if test.op in ("in", "nin") else (test.value,):
            try:
                key = parse_id(text)
            except InvalidField:
                continue  # no memory has such an id
            if format_id(key) == text:
                high, low = (np.uint64(int.from_bytes(key[i : i + 8], "big")) for i in (0, 8))
                found |= (columns.ids[:n, 0] == high) & (columns.ids[:n, 1] == low)
        return ~found if test.op in ("ne", "nin") else found


def _tested(column: Coded, test: Compare, n: int) -> Bools:
    values = column.values
    table = np.fromiter((holds(test.op, v, test.value) for v in values), np.bool_, len(values))
    mask: Bools = table[column.codes[:n]]
    return mask


def _numbers(column: Ints, test: Compare) -> Bools:
    op, value = test.op, test.value
    mask: Bools
    if op == "eq":
        mask = column == value
    elif op == "ne":
        mask = column != value
    elif op == "gt":
        mask = column > value
    elif op == "gte":
        mask = column >= value
    elif op == "lt":
        mask = column < value
    elif op == "lte":
        mask = column <= value
    elif op == "in":
        mask = np.isin(column, value)
    elif op == "nin":
        mask = ~np.isin(column, value)
    else:  # exists: these columns always have a value
        mask = np.full(len(column), test.value)
    return mask


def _cost(tree: Filter) -> int:
    if isinstance(tree, Compare):
        if tree.field == "content":
            return 2
        return 1 if tree.field.startswith(METADATA_PREFIX) else 0
    if isinstance(tree, And | Or):
        return max(map(_cost, tree.parts), default=0)
    return _cost(tree.part)


def _and(within: Bools, other: Bools) -> Bools:
    passed: Bools = within & other
    return passed


def _both(mask: Bools | None, other: Bools) -> Bools:
    return other if mask is None else mask & other
