"""Columns made for filters when first asked for: a metadata value, or a test of the text.

They are filled from the store, in small steps, and from then on with every change. Filters on
anything else need no such column: the block has theirs from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from agentmem_node.index.columns import Coded, Columns
from agentmem_node.model.filter_tree import (
    METADATA_PREFIX,
    And,
    Compare,
    Filter,
    Or,
    holds,
    metadata_value,
)

ReadMemory = Callable[[int], Mapping[str, Any]]
"""The stored record of a doc."""

ColumnKey = str | Compare
"""A path within the metadata, or a comparison of the content (then the values are booleans)."""

# Kept for one block; the one made first goes first.
_COLUMNS_MAX: Final = 16
_STEP_ROWS: Final = 256
_canonical: Final = msgspec.json.Encoder(order="sorted")


class DerivedColumn(Coded):
    __slots__ = ("is_complete",)

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.is_complete = False


class DerivedColumns:
    """Those of one block. They are kept by `Columns`, which gives them room and renumbers them."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._of: dict[ColumnKey, DerivedColumn] = columns.derived

    def needed(self, tree: Filter | None) -> list[ColumnKey]:
        """What a filter needs that is not there yet."""
        return [key for key in _keys_of(tree) if not self._is_complete(key)]

    def get(self, key: ColumnKey, read: ReadMemory) -> Coded:
        """The column, filled now if need be."""
        for _ in self.fill_steps(key, read):
            pass
        return self._of[key]

    def is_complete(self, key: ColumnKey) -> bool:
        return self._is_complete(key)

    def fill_steps(self, key: ColumnKey, read: ReadMemory) -> Iterator[None]:
        """Fill the column in steps of a few milliseconds; changes may come between them."""
        if self._is_complete(key):
            return
        columns = self._columns
        column = self._of.get(key)
        if column is None:
            if len(self._of) >= _COLUMNS_MAX:
                del self._of[next(iter(self._of))]
            column = self._of[key] = DerivedColumn(columns.capacity)
        docs = columns.live_docs()
        for start in range(0, len(docs), _STEP_ROWS):
            for doc in docs[start : start + _STEP_ROWS]:
                row = columns.row_of(doc)  # rows may be renumbered between steps
                if row is not None and columns.is_live[row]:
                    record = read(doc)
                    metadata = record.get("metadata") or {}
                    column.codes[row] = _code(column, key, record["content"], metadata)
            yield
        if self._of.get(key) is column:
            column.is_complete = True

    def put(self, row: int, content: str, metadata: Mapping[str, Any]) -> None:
        """A memory was added, or has changed."""
        for key, column in self._of.items():
            column.codes[row] = _code(column, key, content, metadata)

    def _is_complete(self, key: ColumnKey) -> bool:
        column = self._of.get(key)
        return column is not None and column.is_complete


def _keys_of(tree: Filter | None) -> Iterator[ColumnKey]:
    if tree is None:
        return
    if isinstance(tree, Compare):
        if tree.field == "content":
            yield tree
        elif tree.field.startswith(METADATA_PREFIX):
            yield tree.field[len(METADATA_PREFIX) :]
    elif isinstance(tree, And | Or):
        for part in tree.parts:
            yield from _keys_of(part)
    else:
        yield from _keys_of(tree.part)


def _code(column: Coded, key: ColumnKey, content: str, metadata: Mapping[str, Any]) -> int:
    """The number of a memory's value; values are told apart by their JSON."""
    if isinstance(key, Compare):
        verdict = holds(key.op, content, key.value)
        return column.code(verdict, verdict)
    value = metadata_value(metadata, key)
    return 0 if value is None else column.code(_canonical.encode(value), value)
