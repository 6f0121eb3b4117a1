"""The vectors of a block: one contiguous array of int8, scanned by exact integer arithmetic.

A component is stored as `round(x * scale)`, clipped to -127..127. Sums of such products are
integers, so that a score is the same number on every machine, whatever instructions it has and
however the rows are arranged. The float32 originals stay in the store; those near the top are
read from there and scored on a grid of 2**-20, where float64 sums are exact too.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import simsimd

from agentmem_node.index.columns import Floats, Ints, grown

_GRID: Final = float(1 << 20)
_CODE_MAX: Final = 127

Codes = npt.NDArray[np.int8]
Matrix = npt.NDArray[np.float32]


def scale_of(dim: int) -> float:
    """What a component is multiplied with. A component of a unit vector is about 1/sqrt(dim); one
    in ten million is over 5 times that; what is over 8 is clipped. 300 at 384 dimensions."""
    return float(max(round(15.31 * math.sqrt(dim)), _CODE_MAX))


class QueryVector:
    """A query as the scan and the exact score need it."""

    __slots__ = ("codes", "deviation", "exact", "unit")

    def __init__(self, vector: bytes, scale: float) -> None:
        floats = np.frombuffer(vector, dtype="<f4").astype(np.float64)
        # The query's own range is used to the full: it is one vector, its scale costs nothing.
        largest = float(np.abs(floats).max()) or 1.0
        factor = _CODE_MAX / largest
        self.codes: Codes = np.rint(floats * factor).astype(np.int8).reshape(1, -1)
        self.unit = 1.0 / (scale * factor)  # a product of codes, times this, is a cosine
        # Rounding errors are even within a step, of the rows and of the query alike.
        self.deviation = math.sqrt((1.0 / scale**2 + 1.0 / factor**2) / 12.0)
        # On the same grid as the rows, and divided by what both were multiplied with: a power of
        # two, which changes no digit.
        exact: Floats = np.rint(floats * _GRID)
        exact *= 1.0 / (_GRID * _GRID)
        self.exact = exact


def exact_cosines(vectors: Matrix, query: QueryVector) -> Floats:
    """Cosines of float32 rows with the query, the same on every machine."""
    grid = vectors.astype(np.float64)
    grid *= _GRID
    np.rint(grid, out=grid)
    cosines: Floats = grid @ query.exact
    return cosines


class VectorRows:
    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.scale = scale_of(dim)
        self.codes: Codes = np.zeros((16, dim), dtype=np.int8)

    def reserve(self, rows: int, used: int) -> None:
        if rows > len(self.codes):
            # A first filling is exact; later growth leaves room (which costs nothing until used).
            capacity = rows if used <= 1 else rows + rows // 2
            self.codes = grown(self.codes, used, capacity)

    def put(self, rows: Ints, vectors: Matrix) -> None:
        scaled = vectors * np.float32(self.scale)
        np.rint(scaled, out=scaled)
        np.clip(scaled, -_CODE_MAX, _CODE_MAX, out=scaled)
        self.codes[rows] = scaled

    def clear(self, row: int) -> None:
        self.codes[row] = 0

    def gather(self, query: QueryVector, rows: Ints) -> Floats:
        """The same numbers as `scan`, of some rows."""
        return _products(query.codes, self.codes[rows]) * query.unit

    def keep(self, rows: Ints) -> None:
        """Forget all rows but these, in this order."""
        self.codes = self.codes[rows]

    def scan(self, query: QueryVector, rows: int, start: int = 0) -> Floats:
        """Cosines, as far as int8 knows them, of the rows from `start` to `rows`."""
        return _products(query.codes, self.codes[start:rows]) * query.unit

    def bytes_used(self) -> int:
        return self.codes.nbytes


def _products(query: Codes, codes: Codes) -> Floats:
    """Exact integer dot products of one row with many."""
    if not len(codes):
        return np.zeros(0)
    tensor: Any = simsimd.cdist(query, codes, metric="dot", out_dtype="float64")
    return np.frombuffer(tensor, dtype=np.float64)
