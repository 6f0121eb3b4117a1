"""The columns of a block: what filters, ranking and run order read, one array entry a memory.

Row 0 of every column stands for "no memory": following a missing neighbour leads there, and
reading it gives zeros. Rows are in the order of `doc`, which only grows, so that a doc's row is
found by binary search; an updated memory keeps its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agentmem_node.index.source import IndexDoc

NEVER_MS: Final = (1 << 63) - 1
_ROWS_MIN: Final = 16
_UINT16_MAX: Final = (1 << 16) - 1
_UINT32_MAX: Final = (1 << 32) - 1
_CODED: Final = (
    "user_id", "agent_id", "app_id", "run_id", "categories", "memory_type", "importance",
)  # fmt: skip

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Coded:
    """A column of few distinct values: a number a row, and each distinct value once."""

    __slots__ = ("_code_of", "codes", "values")

    def __init__(self, rows: int) -> None:
        # A byte a row while there are no more than 255 values.
        self.codes: npt.NDArray[Any] = np.zeros(rows, dtype=np.uint8)
        self.values: list[Any] = [None]  # code 0: missing
        self._code_of: dict[Any, int] = {None: 0}

    def code(self, key: Any, value: Any) -> int:
        """The number of a value; `key` is the hashable form that tells it from others."""
        code = self._code_of.get(key)
        if code is None:
            code = self._code_of[key] = len(self.values)
            self.values.append(value)
            if code > np.iinfo(self.codes.dtype).max:
                wider = np.uint16 if code <= _UINT16_MAX else np.uint32
                self.codes = self.codes.astype(wider)
        return code

    def find(self, key: Any) -> int | None:
        return self._code_of.get(key)


class Columns:
    """Grown together; `n` is the number of rows in use, row 0 included.

    A column that most blocks do not need is None until a memory needs it.
    """

    _FIXED: Final = (
        ("_doc_1", np.uint32),
        ("ids", (">u8", 2)),
        ("created_ms", np.int64),
        ("length", np.int32),  # terms, without stop words
        ("is_live", np.bool_),
        ("has_vector", np.bool_),
    )

    _doc_1: npt.NDArray[Any]  # doc + 1, so that row 0 comes before all
    ids: npt.NDArray[np.uint64]  # (rows, 2): the high and the low half
    created_ms: Ints
    length: npt.NDArray[np.int32]
    is_live: Bools
    has_vector: Bools

    def __init__(self) -> None:
        self.n = 1
        self.capacity = _ROWS_MIN
        for name, kind in self._FIXED:
            setattr(self, name, np.zeros(self.capacity, dtype=kind))
        self.expires_ms: Ints | None = None  # None: no memory expires
        self._updated_ms: Ints | None = None  # None: none was updated
        self.coded = {name: Coded(self.capacity) for name in _CODED}
        self.live = 0
        self.without_vector = 0  # live memories that have none
        self.expires_ms_min = NEVER_MS  # no live memory expires before; may be too low
        # Made for filters; see `agentmem_node.index.derived`.
        self.derived: dict[Any, Any] = {}

    @property
    def updated_ms(self) -> Ints:
        return self.created_ms if self._updated_ms is None else self._updated_ms

    @property
    def newest_doc(self) -> int:
        return int(self._doc_1[self.n - 1]) - 1

    def doc_of(self, rows: Ints) -> Ints:
        docs: Ints = self._doc_1[rows].astype(np.int64)
        docs -= 1
        return docs

    def docs(self, rows: Ints) -> list[int]:
        return [doc_1 - 1 for doc_1 in self._doc_1[rows].tolist()]

    def live_docs(self) -> list[int]:
        return self.docs(self.is_live[: self.n].nonzero()[0])

    def row_of(self, doc: int) -> int | None:
        """The row of a doc that this block has seen, live or dead."""
        row = int(self._doc_1[: self.n].searchsorted(doc + 1))
        return row if row < self.n and self._doc_1[row] == doc + 1 else None

    def reserve(self, rows: int) -> None:
        """Room for `rows` rows in all. Untouched room costs nothing: it is mapped lazily."""
        if rows > self.capacity:
            self.capacity = max(rows, self.capacity + self.capacity // 2)
            self._rearrange(lambda array: grown(array, self.n, self.capacity))

    def append(self, docs: Sequence[IndexDoc]) -> slice:
        """Rows for new docs; lengths stay zero until the block has counted terms."""
        start, end = self.n, self.n + len(docs)
        self.reserve(end)
        rows = slice(start, end)
        if docs[-1].doc >= _UINT32_MAX:
            self._doc_1 = self._doc_1.astype(np.uint64)
        self._doc_1[rows] = [d.doc + 1 for d in docs]
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

    def keep(self, rows: Ints) -> None:
        """Forget all rows but these (ascending, row 0 first)."""
        self.n = len(rows)
        self.capacity = max(self.n, _ROWS_MIN)
        self._rearrange(lambda array: grown(array[rows], self.n, self.capacity))
        if self.expires_ms is not None and self.n > 1:
            self.expires_ms_min = int(self.expires_ms[1 : self.n].min())

    def _rearrange(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
        for name, _ in self._FIXED:
            setattr(self, name, change(getattr(self, name)))
        if self.expires_ms is not None:
            self.expires_ms = change(self.expires_ms)
        if self._updated_ms is not None:
            self._updated_ms = change(self._updated_ms)
        for column in (*self.coded.values(), *self.derived.values()):
            column.codes = change(column.codes)

    def _fill(self, rows: slice, docs: Sequence[IndexDoc]) -> None:
        ids = np.frombuffer(b"".join([d.id for d in docs]), dtype=">u8").reshape(-1, 2)
        self.ids[rows] = ids
        self.created_ms[rows] = [d.created_ms for d in docs]
        if self._updated_ms is None and any(d.updated_ms != d.created_ms for d in docs):
            self._updated_ms = self.created_ms.copy()
        if self._updated_ms is not None:
            self._updated_ms[rows] = [d.updated_ms for d in docs]
        expires = [d.expires_ms for d in docs if d.expires_ms is not None]
        if expires:
            self.expires_ms_min = min(self.expires_ms_min, *expires)
            if self.expires_ms is None:
                self.expires_ms = np.full(self.capacity, NEVER_MS)
        if self.expires_ms is not None:
            times = [NEVER_MS if d.expires_ms is None else d.expires_ms for d in docs]
            self.expires_ms[rows] = times
        self.is_live[rows] = True
        has_vector = [d.vector is not None for d in docs]
        self.has_vector[rows] = has_vector
        self.live += len(docs)
        self.without_vector += has_vector.count(False)
        for name, column in self.coded.items():
            if name == "categories":
                codes = [
                    column.code(tuple(d.memory.categories) or None, d.memory.categories)
                    for d in docs
                ]
            else:
                values = [getattr(d.memory, name) for d in docs]
                codes = [column.code(value, value) for value in values]
            column.codes[rows] = codes

    def bytes_used(self) -> int:
        arrays = [getattr(self, name) for name, _ in self._FIXED]
        arrays += [a for a in (self.expires_ms, self._updated_ms) if a is not None]
        coded = [*self.coded.values(), *self.derived.values()]
        arrays += [column.codes for column in coded]
        distinct = sum(len(column.values) for column in coded)
        return sum(int(array.nbytes) for array in arrays) + 150 * distinct


def grown(array: npt.NDArray[Any], used: int, capacity: int) -> npt.NDArray[Any]:
    """A zeroed copy of `capacity` entries along the first axis, holding the first `used`."""
    bigger = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
    bigger[:used] = array[:used]
    return bigger
