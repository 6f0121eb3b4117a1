"""Which memories of a block hold which terms, and how often.

A sorted base (one run of rows a term) and a short unsorted tail for what came since; the tail
is merged when a search finds it long. Before a search looks, the entries of removed memories are
zeroed and the document frequencies counted down, so that these are always exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from agentmem_node.index.columns import Ints, grown

_TAIL_MIN: Final = 2_048
_TAIL_ROOM: Final = 64
_COUNT_MAX: Final = 255
_UINT16_ROWS: Final = 1 << 16

Keys = npt.NDArray[np.uint64]


class Matches(NamedTuple):
    """One entry per (term, memory): the term's position among those asked, and so on."""

    term: Ints
    row: Ints
    occurrences: npt.NDArray[np.float64]


class Found(NamedTuple):
    """Where the terms of a query are, a list entry a term."""

    starts: list[int]
    lengths: list[int]
    in_tail: list[Ints]  # entries; empty when there is no tail
    frequencies: list[int]  # in how many memories each occurs


class Postings:
    def __init__(self) -> None:
        self._keys: Keys = np.zeros(0, dtype=np.uint64)
        # Of each key the first entry, and at the end their number. In how many memories it
        # occurs is the number of its entries, less those that were zeroed (None: none were).
        self._starts = np.zeros(1, dtype=np.int32)
        self._zeroed: npt.NDArray[np.int32] | None = None
        self._rows: npt.NDArray[Any] = np.zeros(0, dtype=np.uint16)
        self._counts = np.zeros(0, dtype=np.uint8)
        self._has_zeroed = False
        self._removed: dict[int, int] = {}  # row -> length of the tail then
        self._tail_keys: Keys = np.zeros(_TAIL_ROOM, dtype=np.uint64)
        self._tail_rows = np.zeros(_TAIL_ROOM, dtype=np.int32)
        self._tail_counts = np.zeros(_TAIL_ROOM, dtype=np.uint8)
        self._tail = 0

    def add(self, rows: Sequence[int], terms: Sequence[Sequence[int]]) -> None:
        """The terms (keys, with repetitions) of each of `rows`, which have no entries now."""
        keys: list[int] = []
        at: list[int] = []
        counts: list[int] = []
        for row, row_terms in zip(rows, terms, strict=True):
            if len(set(row_terms)) == len(row_terms):
                keys += row_terms
                at += [row] * len(row_terms)
                counts += [1] * len(row_terms)
                continue
            tally: dict[int, int] = {}
            for key in row_terms:
                tally[key] = tally.get(key, 0) + 1
            keys += tally
            at += [row] * len(tally)
            counts += [min(count, _COUNT_MAX) for count in tally.values()]
        end = self._tail + len(keys)
        if end > len(self._tail_keys):
            capacity = end + end // 2
            self._tail_keys = grown(self._tail_keys, self._tail, capacity)
            self._tail_rows = grown(self._tail_rows, self._tail, capacity)
            self._tail_counts = grown(self._tail_counts, self._tail, capacity)
        self._tail_keys[self._tail : end] = keys
        self._tail_rows[self._tail : end] = at
        self._tail_counts[self._tail : end] = counts
        self._tail = end

    def remove(self, row: int) -> None:
        """Forget what `row` holds now. Carried out with the next search, together with others:
        it takes a pass over all entries."""
        self._removed[row] = self._tail

    def _carry_out_removals(self) -> None:
        if not self._removed:
            return
        rows = np.fromiter(self._removed, np.int64, len(self._removed))
        # Of a row that got new terms since, entries from this one on are to stay.
        ends = np.fromiter(self._removed.values(), np.int64, len(rows))
        self._removed.clear()
        end_of: Ints = np.zeros(int(rows.max()) + 1, dtype=np.int64)
        end_of[rows] = ends + 1
        if len(self._rows):
            at = (end_of.take(self._rows, mode="clip") > 0).nonzero()[0]
            # Rows beyond the table were taken for its last one.
            at = at[(self._rows[at] < len(end_of)) & (self._counts[at] > 0)]
            if len(at):
                self._counts[at] = 0
                if self._zeroed is None:
                    self._zeroed = np.zeros(len(self._keys), dtype=np.int32)
                np.add.at(self._zeroed, self._starts.searchsorted(at, side="right") - 1, 1)
                self._has_zeroed = True
        tail_rows = self._tail_rows[: self._tail]
        stays = np.arange(1, self._tail + 1) >= end_of.take(tail_rows, mode="clip")
        stays |= tail_rows >= len(end_of)
        if not stays.all():
            self._tail_counts[: self._tail][~stays] = 0
            self._has_zeroed = True

    def find(self, keys: Keys) -> Found:
        """Where the terms are. Valid until the next change."""
        self._carry_out_removals()
        self.merge_if_long()
        size = len(keys)
        if len(self._keys):
            at = self._keys.searchsorted(keys)
            # A key beyond the last is compared with the last, and differs.
            known = self._keys.take(at, mode="clip") == keys
            begins = self._starts.take(at)
            sizes = self._starts.take(at + 1, mode="clip")
            sizes -= begins
            sizes *= known
            starts, lengths = begins.tolist(), sizes.tolist()
            if self._zeroed is not None:
                sizes -= self._zeroed.take(at, mode="clip") * known
            frequencies = sizes.tolist()
        else:
            starts, lengths, frequencies = [0] * size, [0] * size, [0] * size
        in_tail: list[Ints] = []
        if self._tail:
            tail_keys, counts = self._tail_keys[: self._tail], self._tail_counts
            for position, key in enumerate(keys):
                entries = (tail_keys == key).nonzero()[0]
                in_tail.append(entries)
                if len(entries):
                    frequencies[position] += int(np.count_nonzero(counts[entries]))
        return Found(starts, lengths, in_tail, frequencies)

    def matches(self, found: Found) -> Matches:
        """The entries of the terms, by term."""
        rows: list[npt.NDArray[Any]] = []
        counts: list[npt.NDArray[Any]] = []
        lengths = found.lengths
        if not found.in_tail:
            for start, length in zip(found.starts, lengths, strict=True):
                if length:
                    rows.append(self._rows[start : start + length])
                    counts.append(self._counts[start : start + length])
        else:
            lengths = lengths.copy()
            for position, entries in enumerate(found.in_tail):
                start, length = found.starts[position], lengths[position]
                rows += [self._rows[start : start + length], self._tail_rows[entries]]
                counts += [self._counts[start : start + length], self._tail_counts[entries]]
                lengths[position] += len(entries)
        if not rows:
            nothing = np.zeros(0, dtype=np.int64)
            return Matches(nothing, nothing, np.zeros(0))
        term = np.arange(len(lengths)).repeat(lengths)
        row = np.concatenate(rows, dtype=np.int64)
        occurrences = np.concatenate(counts, dtype=np.float64)
        if self._has_zeroed:
            held = occurrences > 0
            return Matches(term[held], row[held], occurrences[held])
        return Matches(term, row, occurrences)

    def merge_if_long(self) -> None:
        if self._tail > max(_TAIL_MIN, len(self._rows) // 8):
            self.merge()

    def merge(self) -> None:
        """Bring the tail into the base, and drop zeroed entries. Linear in the base."""
        self._carry_out_removals()
        if self._has_zeroed:
            self._drop_zeroed()
        keys = self._tail_keys[: self._tail]
        rows, counts = self._tail_rows[: self._tail], self._tail_counts[: self._tail]
        order = keys.argsort(kind="stable")
        if not counts.all():
            order = order[counts[order] > 0]
        self._insert(keys[order], rows[order], counts[order])
        self._tail = 0
        self._tail_keys = np.zeros(_TAIL_ROOM, dtype=np.uint64)
        self._tail_rows = np.zeros(_TAIL_ROOM, dtype=np.int32)
        self._tail_counts = np.zeros(_TAIL_ROOM, dtype=np.uint8)

    def renumber(self, new_row: Ints) -> None:
        """Rows become `new_row[row]`; those that become 0 are forgotten."""
        self.merge()
        rows = new_row[self._rows]
        self._rows = rows.astype(np.uint16 if len(new_row) <= _UINT16_ROWS else np.int32)
        self._counts[self._rows == 0] = 0
        self._drop_zeroed()

    def _drop_zeroed(self) -> None:
        held = self._counts > 0
        if not held.all():
            sizes = np.add.reduceat(held, self._starts[:-1], dtype=np.int64)
            self._rows, self._counts = self._rows[held], self._counts[held]
            self._set_terms(self._keys[sizes > 0], sizes[sizes > 0])
        self._has_zeroed = False
        self._zeroed = None

    def _insert(
        self, keys: Keys, rows: npt.NDArray[np.int32], counts: npt.NDArray[np.uint8]
    ) -> None:
        """Entries sorted by key, each put behind those that its term has already."""
        if not len(keys):
            return
        first = np.ones(len(keys), dtype=np.bool_)
        first[1:] = keys[1:] != keys[:-1]
        begins = first.nonzero()[0]
        distinct = keys[begins]
        added = np.diff(begins, append=len(keys))
        at = self._keys.searchsorted(distinct)
        # One past the last term there is no key to compare with, and none can be equal.
        is_known = np.append(self._keys, np.uint64(0))[at] == distinct
        places = self._starts[at + is_known].repeat(added)
        if self._rows.dtype == np.uint16 and int(rows.max()) >= _UINT16_ROWS:
            self._rows = self._rows.astype(np.int32)
        self._rows = np.insert(self._rows, places, rows)
        self._counts = np.insert(self._counts, places, counts)
        sizes = np.diff(self._starts)
        sizes[at[is_known]] += added[is_known]
        fresh = ~is_known
        self._set_terms(
            np.insert(self._keys, at[fresh], distinct[fresh]),
            np.insert(sizes, at[fresh], added[fresh]),
        )

    def _set_terms(self, keys: Keys, sizes: npt.NDArray[Any]) -> None:
        self._keys = keys
        self._starts = np.zeros(len(keys) + 1, dtype=np.int32)
        np.cumsum(sizes, out=self._starts[1:])

    def bytes_used(self) -> int:
        per_entry = 1 + self._rows.itemsize
        return 12 * len(self._keys) + per_entry * len(self._rows) + 13 * len(self._tail_keys)
