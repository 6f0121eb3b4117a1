"""The columns of a block: what filters, ranking and run order read, one array entry a memory.

Row 0 of every column stands for "no memory": following a missing neighbour leads there, and
reading it gives zeros. Rows are in the order of `doc`, which only grows, so that a doc's row is
found by binary search; an updated memory keeps its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt

from agentmem_node.index.source import IndexDoc
from agentmem_node.model.memory import MemoryType

NEVER_MS: Final = (1 << 63) - 1
MEMORY_TYPES: Final[tuple[str, ...]] = get_args(MemoryType)
_TYPE_CODES: Final = {name: code for code, name in enumerate(MEMORY_TYPES)}
_ROWS_MIN: Final = 16

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Coded:
    """A column of few distinct values: a number a row, and each distinct value once."""

    __slots__ = ("_code_of", "codes", "values")

    def __init__(self, rows: int) -> None:
        self.codes = np.zeros(rows, dtype=np.int32)
        self.values: list[Any] = [None]  # code 0: missing
        self._code_of: dict[Any, int] = {None: 0}

    def code(self, key: Any, value: Any) -> int:
        """The number of a value; `key` is the hashable form that tells it from others."""
        code = self._code_of.get(key)
        if code is None:
            code = self._code_of[key] = len(self.values)
            self.values.append(value)
        return code

    def find(self, key: Any) -> int | None:
        return self._code_of.get(key)


class Columns:
    """Grown together; `n` is the number of rows in use, row 0 included."""

    _FIXED: Final = (
        ("doc", np.int64),
        ("id_high", np.uint64),
        ("id_low", np.uint64),
        ("created_ms", np.int64),
        ("updated_ms", np.int64),
        ("expires_ms", np.int64),
        ("importance", np.float64),
        ("memory_type", np.uint8),
        ("length", np.int32),  # terms, without stop words
        ("is_live", np.bool_),
        ("has_vector", np.bool_),
    )

    doc: Ints
    id_high: npt.NDArray[np.uint64]
    id_low: npt.NDArray[np.uint64]
    created_ms: Ints
    updated_ms: Ints
    expires_ms: Ints
    importance: Floats
    memory_type: npt.NDArray[np.uint8]
    length: npt.NDArray[np.int32]
    is_live: Bools
    has_vector: Bools

    def __init__(self) -> None:
        self.n = 1
        self.capacity = _ROWS_MIN
        for name, kind in self._FIXED:
            setattr(self, name, np.zeros(self.capacity, dtype=kind))
        self.doc[0] = -1
        self.coded = {
            name: Coded(self.capacity)
            for name in ("user_id", "agent_id", "app_id", "run_id", "categories")
        }
        self.live = 0
        self.without_vector = 0  # live memories that have none
        self.expires_ms_min = NEVER_MS  # no live memory expires before; may be too low
        # Made for filters; see `agentmem_node.index.derived`.
        self.derived: dict[Any, Any] = {}

    def reserve(self, rows: int) -> None:
        """Room for `rows` rows in all. Untouched room costs nothing: it is mapped lazily."""
        if rows <= self.capacity:
            return
        self.capacity = max(rows, self.capacity + self.capacity // 2)
        for name, _ in self._FIXED:
            setattr(self, name, grown(getattr(self, name), self.n, self.capacity))
        for column in (*self.coded.values(), *self.derived.values()):
            column.codes = grown(column.codes, self.n, self.capacity)

    def row_of(self, doc: int) -> int | None:
        """The row of a doc that this block has seen, live or dead."""
        row = int(self.doc[: self.n].searchsorted(doc))
        return row if row < self.n and self.doc[row] == doc else None

    def append(self, docs: Sequence[IndexDoc]) -> slice:
        """Rows for new docs; lengths stay zero until the block has counted terms."""
        start, end = self.n, self.n + len(docs)
        self.reserve(end)
        rows = slice(start, end)
        self.doc[rows] = [d.doc for d in docs]
        self.n = end
        self._fill(rows, docs)
        return rows

    def replace(self, row: int, doc: IndexDoc) -> None:
        """The next version of the memory in `row`, which `kill` has cleared before."""
        self._fill(slice(row, row + 1), [doc])

    def kill(self, row: int) -> None:
        self.is_live[row] = False
        self.live -= 1
        if not self.has_vector[row]:
            self.without_vector -= 1
        self.has_vector[row] = False
        self.length[row] = 0

    def _fill(self, rows: slice, docs: Sequence[IndexDoc]) -> None:
        ids = np.frombuffer(b"".join([d.id for d in docs]), dtype=">u8").reshape(-1, 2)
        self.id_high[rows] = ids[:, 0]
        self.id_low[rows] = ids[:, 1]
        self.created_ms[rows] = [d.created_ms for d in docs]
        self.updated_ms[rows] = [d.updated_ms for d in docs]
        expires = [NEVER_MS if d.expires_ms is None else d.expires_ms for d in docs]
        self.expires_ms[rows] = expires
        self.expires_ms_min = min(self.expires_ms_min, *expires)
        self.importance[rows] = [d.memory.importance for d in docs]
        self.memory_type[rows] = [_TYPE_CODES[d.memory.memory_type] for d in docs]
        self.is_live[rows] = True
        has_vector = [d.vector is not None for d in docs]
        self.has_vector[rows] = has_vector
        self.live += len(docs)
        self.without_vector += has_vector.count(False)
        for name, column in self.coded.items():
            if name == "categories":
                keys: list[Any] = [tuple(d.memory.categories) or None for d in docs]
            else:
                keys = [getattr(d.memory, name) for d in docs]
            column.codes[rows] = [
                column.code(key, list(key) if isinstance(key, tuple) else key) for key in keys
            ]

    def bytes_used(self) -> int:
        per_row = sum(np.dtype(kind).itemsize for _, kind in self._FIXED) + 4 * (
            len(self.coded) + len(self.derived)
        )
        distinct = sum(len(c.values) for c in (*self.coded.values(), *self.derived.values()))
        return self.capacity * per_row + distinct * 150

    def keep(self, rows: Ints) -> None:
        """Forget all rows but these (ascending, row 0 first)."""
        self.n = len(rows)
        self.capacity = max(self.n, _ROWS_MIN)
        for name, _ in self._FIXED:
            setattr(self, name, grown(getattr(self, name)[rows], self.n, self.capacity))
        for column in (*self.coded.values(), *self.derived.values()):
            column.codes = grown(column.codes[rows], self.n, self.capacity)
        live = self.expires_ms[1 : self.n]
        self.expires_ms_min = int(live.min()) if len(live) else NEVER_MS


def grown(array: npt.NDArray[Any], used: int, capacity: int) -> npt.NDArray[Any]:
    """A zeroed copy of `capacity` entries along the first axis, holding the first `used`."""
    bigger = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
    bigger[:used] = array[:used]
    return bigger
