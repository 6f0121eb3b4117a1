"""Where the entries of one group stand: a sorted table of runs, 44 bytes each.

A run is the part of one APPEND or RELOCATE row that still counts: from its first index to the
next run's (or to the log's end). Columns, not objects: a log of single-entry runs has hundreds
of thousands of them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Segment numbers start at 1. A run that is not written yet carries a token above all of them.
MISSING = 0
TOKEN_BASE = 1 << 63


class Run(NamedTuple):
    first: int
    term: int
    segment: int
    offset: int  # of the content
    size: int  # of the content
    entries: int  # in the content; the last ones may be truncated
    crc: int


class RunIndex:
    def __init__(self) -> None:
        self.first: array[int] = array("Q")
        self.term: array[int] = array("Q")
        self.segment = array("Q")
        self.offset = array("Q")
        self.size = array("I")
        self.count = array("I")
        self.crc = array("I")
        self._columns: tuple[array[int], ...] = (
            self.first,
            self.term,
            self.segment,
            self.offset,
            self.size,
            self.count,
            self.crc,
        )

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, at: int) -> Run:
        return Run(
            self.first[at],
            self.term[at],
            self.segment[at],
            self.offset[at],
            self.size[at],
            self.count[at],
            self.crc[at],
        )

    def add(
        self, first: int, term: int, segment: int, offset: int, size: int, count: int, crc: int
    ) -> None:
        self.first.append(first)
        self.term.append(term)
        self.segment.append(segment)
        self.offset.append(offset)
        self.size.append(size)
        self.count.append(count)
        self.crc.append(crc)

    def at(self, index: int) -> int:
        """The position of the run that holds entry `index`; -1 when it stands before all."""
        return bisect_right(self.first, index) - 1

    def place(self, first: int, token: int, run: Run) -> None:
        """Say where the run that waited under `token` was written, if it still counts."""
        at = bisect_left(self.first, first)
        if at < len(self.first) and self.first[at] == first and self.segment[at] == token:
            self._put(at, run)

    def replace(self, run: Run, first_index: int, last_index: int) -> None:
        """Let `run` hold its entries, where others did: a relocation. The indexes are the log's.

        Raises ValueError when it would split a run: only whole runs, or the end of a run whose
        first entries are compacted, are ever relocated, and any part of what is missing.
        """
        end = run.first + run.entries
        start = max(self.at(run.first), 0)
        stop = bisect_left(self.first, end)
        if not start < stop:
            raise ValueError("entries are relocated that no run holds")
        old = self[stop - 1]
        old_end = self.first[stop] if stop < len(self.first) else last_index + 1
        rows = [run]
        if end < old_end:
            if old.segment != MISSING:
                raise ValueError("a relocation splits a run")
            rows.append(old._replace(first=end))
        if max(self.first[start], first_index) < run.first:
            if self.segment[start] != MISSING:
                raise ValueError("a relocation splits a run")
            start += 1  # the missing head stays, and stays missing
        for column, values in zip(self._columns, zip(*rows, strict=True), strict=True):
            column[start:stop] = array(column.typecode, values)

    def cut_from(self, index: int) -> None:
        """Drop the runs that begin at `index` or later."""
        at = bisect_left(self.first, index)
        for column in self._columns:
            del column[at:]

    def cut_before(self, index: int) -> None:
        """Drop the runs that end before `index`."""
        at = max(self.at(index), 0)
        for column in self._columns:
            del column[:at]

    def clear(self) -> None:
        for column in self._columns:
            del column[:]

    def oldest_segment(self) -> int | None:
        return min(self.segment) if self.segment else None

    def in_segment(self, segment: int) -> Sequence[int]:
        """Positions of the runs within a segment."""
        count = self.segment.count(segment)
        if not count:
            return ()
        start = self.segment.index(segment)
        if self.segment[start : start + count].count(segment) == count:
            return range(start, start + count)  # nearly always: rows are written in order
        return [at for at, where in enumerate(self.segment) if where == segment]

    def __iter__(self) -> Iterator[Run]:
        return (self[at] for at in range(len(self)))

    def _put(self, at: int, run: Run) -> None:
        for column, value in zip(self._columns, run, strict=True):
            column[at] = value
