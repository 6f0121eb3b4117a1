"""HNSW over the vectors of a large block: sealed when built, with a tail and tombstones beside it.

A graph covers the rows that the block had when its construction began. It is never written to
again (adding to a faiss index that is being searched crashes the process): rows that came later
are the tail, rows that changed are stale; both are scored exactly by the scan's arithmetic. When
they are too many, the next graph is built in a thread, and replaces this one when it is done.

The scan is exact, and so its order is the same on every replica. A graph's is as stable as its
recall: why `graph_rows_min` is not lower.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import faiss
import numpy as np

from agentmem_node.index.columns import Bools, Ints
from agentmem_node.index.vectors import QueryVector, VectorRows

_faiss: Any = faiss  # its stubs know only a part of it
_log = logging.getLogger(__name__)

_LINKS: Final = 32  # a row links to twice as many on the ground level: 256 bytes
_BUILD_WIDTH: Final = 80
_ADD_ROWS: Final = 2_048
# Tail and stale rows, as a share of the graph's, that call for a new one.
_OUTDATED_SHARE_MAX: Final = 0.2


class Near(NamedTuple):
    """The rows near a query, and the least of their cosines: no other row has more."""

    rows: Ints
    floor: float


class Graph:
    """One sealed graph over the first `rows` rows of a block."""

    def __init__(self, index: Any, rows: int) -> None:
        self.rows = rows
        self._index = index
        self._is_stale: Bools = np.zeros(rows, dtype=np.bool_)
        self._stale = 0

    def mark_stale(self, row: int) -> None:
        if row < self.rows and not self._is_stale[row]:
            self._is_stale[row] = True
            self._stale += 1

    def is_outdated(self, rows: int) -> bool:
        return self._stale + rows - self.rows > _OUTDATED_SHARE_MAX * self.rows

    def near(self, query: QueryVector, vectors: VectorRows, rows: int, depth: int) -> Near:
        """The `depth` rows nearest to a query, of all `rows` of the block."""
        asked = depth + min(self._stale, depth)
        codes = query.codes.astype(np.float32)
        parameters = _faiss.SearchParametersHNSW(efSearch=asked)
        # Products of codes are integers below 2**24, which float32 adds up exactly.
        products, labels = self._index.search(codes, asked, params=parameters)
        found: Ints = labels[0]
        valid = found > 0
        valid &= ~self._is_stale[found]
        stale = self._is_stale.nonzero()[0]
        near = np.concatenate([found[valid], stale, np.arange(self.rows, rows)])
        cosines = np.concatenate(
            [
                products[0][valid].astype(np.float64) * query.unit,
                vectors.gather(query, stale),
                vectors.scan(query, rows, start=self.rows),
            ]
        )
        if len(near) > depth:
            floor = float(np.partition(cosines, -depth)[-depth])
            near = near[cosines >= floor]
        else:
            floor = 0.0
        return Near(near, floor)


class _Construction:
    """A graph being built. `changed`: rows written since it began."""

    def __init__(self, vectors: VectorRows, rows: int) -> None:
        self.codes = vectors.codes
        self.rows = rows
        self.changed: list[int] = []
        self.graph: Graph | None = None
        self.is_cancelled = False


class GraphBuilder:
    """Builds graphs in one thread, one after the other: each keeps a core busy for seconds."""

    def __init__(self) -> None:
        self._queue: deque[_Construction] = deque()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, construction: _Construction) -> None:
        self._queue.append(construction)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="vector-graph", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            while self._queue and not self._stop.is_set():
                construction = self._queue.popleft()
                try:
                    construction.graph = _build(
                        construction,
                        lambda c=construction: c.is_cancelled or self._stop.is_set(),  # type: ignore[misc]
                    )
                except (RuntimeError, MemoryError) as error:
                    # The block goes on being scanned.
                    construction.is_cancelled = True
                    _log.warning("A vector graph of %d rows failed: %s", construction.rows, error)


class BlockGraph:
    """The graph of one block, from its first construction on."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder
        self._graph: Graph | None = None
        self._construction: _Construction | None = None

    @property
    def is_building(self) -> bool:
        return self._construction is not None

    def changed(self, row: int) -> None:
        """A row's vector was written or cleared."""
        if self._graph is not None:
            self._graph.mark_stale(row)
        if self._construction is not None and row < self._construction.rows:
            self._construction.changed.append(row)

    def forget(self) -> None:
        """Rows were renumbered, or the block is gone."""
        self._graph = None
        if self._construction is not None:
            self._construction.is_cancelled = True
            self._construction = None

    def current(self, vectors: VectorRows, rows: int) -> Graph | None:
        """The graph to search with, if there is one; starts building when it is time to."""
        construction = self._construction
        if construction is not None and construction.graph is not None:
            self._graph, self._construction = construction.graph, None
            for row in construction.changed:
                self._graph.mark_stale(row)
        elif construction is not None and construction.is_cancelled:
            self._construction = None
        if self._construction is None and (self._graph is None or self._graph.is_outdated(rows)):
            self._construction = _Construction(vectors, rows)
            self._builder.submit(self._construction)
        return self._graph


def _build(construction: _Construction, is_cancelled: Callable[[], bool]) -> Graph | None:
    codes, rows = construction.codes, construction.rows
    index = _faiss.IndexHNSWSQ(
        codes.shape[1],
        _faiss.ScalarQuantizer.QT_8bit_direct_signed,
        _LINKS,
        _faiss.METRIC_INNER_PRODUCT,
    )
    index.hnsw.efConstruction = _BUILD_WIDTH
    index.is_trained = True
    for start in range(0, rows, _ADD_ROWS):
        if is_cancelled():
            return None
        # A row that is overwritten meanwhile is in `changed`, and stale from the beginning.
        index.add(codes[start : min(start + _ADD_ROWS, rows)].astype(np.float32))
    return Graph(index, rows)
