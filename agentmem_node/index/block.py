"""A block: everything needed to rank the memories of one owner (or of a tenant on this shard).

Built from the store on first use, then kept up to date change by change. What a search finds
depends on the memories alone, not on how the block came to hold them: an incremental block and
a freshly built one rank alike (a property test says so).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from agentmem_node.index.analysis import Analyzer
from agentmem_node.index.columns import Columns, Floats, Ints
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.derived import DerivedColumns
from agentmem_node.index.graph import BlockGraph
from agentmem_node.index.postings import Postings
from agentmem_node.index.runs import RunLinks
from agentmem_node.index.source import IndexDoc
from agentmem_node.index.vectors import VectorRows

# Dead rows cost scan time; beyond this share (and a few) the block is packed.
_DEAD_SHARE_MAX: Final = 0.2
_DEAD_ROWS_MIN: Final = 64


class Context(NamedTuple):
    """Of every row of a block, as of a generation of it."""

    generation: int
    length: Floats | None  # in words, averaged with the neighbours; None: no neighbours
    share: Floats | None  # 1 / (1 + the weights of the neighbours present); None: no neighbours
    trust: npt.NDArray[np.float32]  # in a cosine, by the length of the text
    exposure: (
        Floats | npt.NDArray[np.float32]
    )  # how much of an error in the cosine gets into the score: trust * share


class Block:
    def __init__(self, dim: int, analyzer: Analyzer, defaults: RankingDefaults) -> None:
        self.columns = Columns()
        self.derived = DerivedColumns(self.columns)
        self.postings = Postings()
        self.links = RunLinks()
        self.vectors = VectorRows(dim)
        self.terms_total = 0  # over live memories: the average length is exact
        self.generation = 0  # counts changes
        self.graph: BlockGraph | None = None  # of a large block
        self.text_space: int | None = None  # in the node's index of phrases, once one was sought
        self.on_text: Callable[[int, str | None], None] | None = None  # doc, text; None: removed
        self._analyzer = analyzer
        self._defaults = defaults
        self._context: Context | None = None

    def reserve(self, memories: int) -> None:
        """Room for so many memories in all, so that filling does not copy what is there."""
        rows = memories + 1
        self.columns.reserve(rows)
        self.links.reserve(rows)
        self.vectors.reserve(rows, self.columns.n)

    def put(self, docs: Sequence[IndexDoc]) -> None:
        """Add memories, or replace those whose `doc` is known."""
        self.generation += 1
        newest = self.columns.newest_doc
        fresh: list[IndexDoc] = []
        for doc in docs:
            if doc.doc > newest:
                fresh.append(doc)
                newest = doc.doc
                continue
            # Either in the block, or earlier in this very batch.
            self._append(fresh)
            fresh = []
            self._replace(doc)
        self._append(fresh)

    def remove(self, doc: int) -> None:
        row = self.columns.row_of(doc)
        if row is not None and self.columns.is_live[row]:
            self.generation += 1
            self._clear(row)
            self._pack_if_sparse()

    @property
    def average_length(self) -> float:
        return self.terms_total / self.columns.live if self.terms_total else 1.0

    def context(self) -> Context:
        """What scores take from runs and lengths; computed once after each change."""
        if self._context is None or self._context.generation != self.generation:
            n = self.columns.n
            length = self.columns.length[:n].astype(np.float64)
            share_of_itself = (length + 1.0) / (length + 1.0 + self._defaults.length_half)
            trust: npt.NDArray[np.float32] = share_of_itself.astype(np.float32)
            if self.links.has_links:
                present = np.ones(n)
                present[0] = 0.0
                present = self.with_neighbours(present)
                present[0] = 1.0
                length = self.with_neighbours(length)
                length /= present
                share = 1.0 / present
                self._context = Context(self.generation, length, share, trust, trust * share)
            else:
                self._context = Context(self.generation, None, None, trust, trust)
        return self._context

    def with_neighbours(self, values: Floats) -> Floats:
        """values + weights * the values of the neighbours; values[0], of no memory, must be 0."""
        n = self.columns.n
        earlier_1, earlier_2 = self._defaults.context_earlier
        later_1, later_2 = self._defaults.context_later
        before, after = self.links.before[:n], self.links.after[:n]
        lent = values.take(before)
        lent *= earlier_1
        lent += values
        others = ((before.take(before), earlier_2), (after, later_1), (after.take(after), later_2))
        for rows, weight in others:
            part = values.take(rows)
            part *= weight
            lent += part
        return lent

    def bytes_used(self) -> int:
        context = 0
        if self._context is not None:
            context = (28 if self.links.has_links else 4) * self.columns.n
        return (
            self.columns.bytes_used()
            + self.postings.bytes_used()
            + self.links.bytes_used()
            + self.vectors.bytes_used()
            + context
        )

    # -- changing -----------------------------------------------------------------------

    def _append(self, docs: Sequence[IndexDoc]) -> None:
        if not docs:
            return
        used = self.columns.n
        rows = self.columns.append(docs)
        self.vectors.reserve(self.columns.n, used)
        self.links.reserve(self.columns.n)
        self._index(range(rows.start, rows.stop), docs)

    def _replace(self, doc: IndexDoc) -> None:
        row = self.columns.row_of(doc.doc)
        if row is None:
            # Added and deleted again while the block was being built: its removal is yet to come.
            return
        if self.columns.is_live[row]:
            self._clear(row)
        self.columns.replace(row, doc)
        self._index([row], [doc])

    def _index(self, rows: Sequence[int], docs: Sequence[IndexDoc]) -> None:
        """Terms, vectors and links of rows whose columns are filled."""
        analyzer = self._analyzer
        terms = [analyzer.keys(doc.memory.content) for doc in docs]
        lengths = [len(t) for t in terms]  # without the terms of dates, which no text wrote
        terms = [t + analyzer.date_keys(d.created_ms) for t, d in zip(terms, docs, strict=True)]
        self.columns.length[rows[0] : rows[-1] + 1] = lengths
        self.terms_total += sum(lengths)
        self.postings.add(rows, terms)
        if self.vectors.dim:
            held = [(row, doc.vector) for row, doc in zip(rows, docs, strict=True) if doc.vector]
            if held:
                floats = np.frombuffer(b"".join([v for _, v in held if v]), dtype="<f4")
                at: Ints = np.array([row for row, _ in held], dtype=np.int64)
                self.vectors.put(at, floats.reshape(len(held), self.vectors.dim))
                if self.graph is not None:
                    for row, _ in held:
                        self.graph.changed(row)
        for row, doc in zip(rows, docs, strict=True):
            memory = doc.memory
            if memory.run_id is not None:
                self.links.insert(row, memory.scope.owner, memory.run_id, self.columns)
        if self.on_text is not None:
            for doc in docs:
                self.on_text(doc.doc, doc.memory.content)
        if self.columns.derived:
            for row, doc in zip(rows, docs, strict=True):
                self.derived.put(row, doc.memory.content, doc.memory.metadata)

    def _clear(self, row: int) -> None:
        self.terms_total -= int(self.columns.length[row])
        if self.on_text is not None:
            self.on_text(int(self.columns.doc_of(np.array([row]))[0]), None)
        self.columns.kill(row)
        self.postings.remove(row)
        self.links.remove(row)
        if self.vectors.dim:
            self.vectors.clear(row)
            if self.graph is not None:
                self.graph.changed(row)

    def _pack_if_sparse(self) -> None:
        dead = self.columns.n - 1 - self.columns.live
        if dead < _DEAD_ROWS_MIN or dead < _DEAD_SHARE_MAX * self.columns.n:
            return
        n = self.columns.n
        kept: Ints = np.concatenate(
            [np.zeros(1, dtype=np.int64), np.flatnonzero(self.columns.is_live[:n])]
        )
        new_row: Ints = np.zeros(n, dtype=np.int64)
        new_row[kept] = np.arange(len(kept))
        self.postings.renumber(new_row)
        self.links.renumber(kept, new_row)
        self.vectors.keep(kept)
        if self.graph is not None:
            self.graph.forget()
        self.columns.keep(kept)
