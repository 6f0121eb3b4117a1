"""Which memories stand next to each other in a run, kept while memories come and go.

A run is what shares owner and run_id; its order is (created, doc), so that turns stored in one
batch, all with the same time, keep the order in which they were sent. Links are rows; 0 is none.
"""

from __future__ import annotations

import numpy as np

from agentmem_node.index.columns import Columns, Ints, grown


class RunLinks:
    def __init__(self) -> None:
        # Empty until the first memory of a run comes. Links are looked up all the time, and so
        # have the width that numpy looks up with.
        self.before: Ints = np.zeros(0, dtype=np.int64)
        self.after: Ints = np.zeros(0, dtype=np.int64)
        self.run = np.zeros(0, dtype=np.int32)  # a number for (owner, run_id); 0: no run
        self._number_of: dict[tuple[str, str], int] = {}
        self._last_row: list[int] = [0]  # of each run: where the next turn most likely goes
        self.has_links = False  # False: no memory of the block ever had a neighbour

    def reserve(self, rows: int) -> None:
        """Room for `rows` rows in all, if there is any run."""
        if len(self._last_row) > 1 and rows > len(self.before):
            self._grow(rows + rows // 2)

    def insert(self, row: int, owner: str, run_id: str, columns: Columns) -> None:
        """Link a row that has just been filled into its run."""
        if row >= len(self.before):
            self._grow(columns.capacity)
        number = self._number_of.get((owner, run_id))
        if number is None:
            number = self._number_of[(owner, run_id)] = len(self._last_row)
            self._last_row.append(0)
        self.run[row] = number
        before = self._last_row[number]
        if before and not self._is_before(before, row, columns):
            before = self._place(row, number, columns)
        after = int(self.after[before]) if before else self._first(number, row, columns)
        self._join(before, row)
        self._join(row, after)
        if not after:
            self._last_row[number] = row

    def remove(self, row: int) -> None:
        """Unlink a row; its neighbours become each other's."""
        if row >= len(self.before):
            return
        before, after = int(self.before[row]), int(self.after[row])
        number = int(self.run[row])
        self.before[row] = self.after[row] = self.run[row] = 0
        if before and after:
            self._join(before, after)
        elif before:
            self.after[before] = 0
        elif after:
            self.before[after] = 0
        if number and self._last_row[number] == row:
            self._last_row[number] = before

    def renumber(self, kept: Ints, new_row: Ints) -> None:
        """Rows become `new_row[row]`; `kept` are the old rows that stay."""
        if not len(self.before):
            return
        kept = kept[kept < len(self.before)]
        self.before = new_row[self.before[kept]]
        self.after = new_row[self.after[kept]]
        self.run = self.run[kept]
        self._last_row = [int(new_row[row]) for row in self._last_row]

    def _grow(self, capacity: int) -> None:
        used = len(self.before)
        self.before = grown(self.before, used, capacity)
        self.after = grown(self.after, used, capacity)
        self.run = grown(self.run, used, capacity)

    def _join(self, before: int, after: int) -> None:
        if before and after:
            self.after[before] = after
            self.before[after] = before
            self.has_links = True

    @staticmethod
    def _is_before(a: int, b: int, columns: Columns) -> bool:
        left, right = columns.created_ms[a], columns.created_ms[b]
        return bool(left < right) or (bool(left == right) and a < b)

    def _members(self, number: int, row: int, columns: Columns) -> Ints:
        """The rows of a run other than `row`."""
        members = np.flatnonzero(self.run[: columns.n] == number)
        others: Ints = members[members != row]
        return others

    def _place(self, row: int, number: int, columns: Columns) -> int:
        """The row of the run that comes right before `row`; 0 when none does."""
        members = self._members(number, row, columns)
        created = columns.created_ms[members]
        earlier = members[
            (created < columns.created_ms[row])
            | ((created == columns.created_ms[row]) & (members < row))
        ]
        if not len(earlier):
            return 0
        return int(earlier[np.lexsort((earlier, columns.created_ms[earlier]))[-1]])

    def _first(self, number: int, row: int, columns: Columns) -> int:
        """The first row of a run apart from `row`; 0 when there is none."""
        if not self._last_row[number]:
            return 0
        members = self._members(number, row, columns)
        return int(members[np.lexsort((members, columns.created_ms[members]))[0]])

    def bytes_used(self) -> int:
        return 20 * len(self.before) + 150 * len(self._last_row)
