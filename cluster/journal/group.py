"""The log of one replica group: what Raft asks of a journal. Everything here is buffered;
`Journal.begin_flush` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from agentmem_cluster.journal import format as fmt
from agentmem_cluster.journal.runs import Run, RunIndex
from agentmem_cluster.raft.api import Entry

if TYPE_CHECKING:
    from agentmem_cluster.journal.journal import Journal

# A row is read back whole, so a small row keeps reading one entry of it cheap.
RUN_BYTES_MAX = 256 * 1024
# What an entry costs in the window beside its command: the tuple, two integers, the key.
ENTRY_OVERHEAD_BYTES = 200


class Record:
    """One row of a block to come."""

    __slots__ = ("commands", "content", "group", "index", "kind", "size_bytes", "term", "token")

    def __init__(
        self, kind: int, group: GroupLog, term: int = 0, index: int = 0, content: bytes = b""
    ) -> None:
        self.kind = kind
        self.group = group
        self.term = term
        self.index = index
        self.content = content
        self.commands: list[bytes] | None = None
        self.size_bytes = len(content)
        self.token = 0

    def encode(self) -> tuple[bytes, bytes]:
        """(row, content)."""
        if self.commands is None:
            count = 1 if self.content else 0
            content = self.content
        else:
            count = len(self.commands)
            content = fmt.encode_commands(self.commands)
        row = fmt.encode_row(self.kind, self.group.number, self.term, self.index, count, content)
        return row, content


class GroupLog:
    """Entries `first_index..last_index`, the term and the vote of one group.

    A fresh log: first_index 1, last_index 0, term 0.
    """

    def __init__(self, journal: Journal, number: int, state: fmt.GroupState) -> None:
        self._journal = journal
        self.number = number
        self.id = state.id
        self.epoch = state.epoch
        self.first_index = state.first_index
        self.base_term = state.base_term
        self.last_index = state.last_index
        self.last_term = state.last_term
        self.durable_index = state.last_index
        self.term = state.term
        self.vote = state.vote
        self.runs = RunIndex()
        self._window: dict[int, Entry] = {}
        self._open_append: Record | None = None
        self._hard_changes = 0  # how often term and vote changed, and how often of it is durable
        self._hard_durable = 0
        self._read_back: tuple[Run, list[Entry]] | None = None

    def __repr__(self) -> str:
        return f"<GroupLog {self.id}@{self.epoch} {self.first_index}..{self.last_index}>"

    # -- reading ------------------------------------------------------------------------

    def term_at(self, index: int) -> int:
        """The term of a kept entry, or of the one before the first. Raises IndexError."""
        if index == self.last_index:
            return self.last_term
        if index == self.first_index - 1:
            return self.base_term
        if not self.first_index <= index < self.last_index:
            raise IndexError(f"{self!r} keeps no entry {index}")
        return self.runs.term[self.runs.at(index)]

    def slice(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries first..last, at least one when there is any, then while `bytes_max` allows.

        Raises IndexError when `first` was compacted away, JournalCorrupt when one cannot be read.
        """
        if first < self.first_index:
            raise IndexError(f"{self!r} keeps no entry {first}")
        found: list[Entry] = []
        size = 0
        for entry in self._entries(first, min(last, self.last_index)):
            size += len(entry.command)
            if size > bytes_max and found:
                break
            found.append(entry)
        return found

    def command_at(self, index: int) -> Entry:
        """Raises IndexError when the entry is not kept."""
        entry = self._window.get(index)
        if entry is not None:
            return entry
        if not self.first_index <= index <= self.last_index:
            raise IndexError(f"{self!r} keeps no entry {index}")
        return next(self._entries(index, index))

    def _entries(self, index: int, last: int) -> Iterator[Entry]:
        window = self._window
        while index <= last:
            entry = window.get(index)
            if entry is not None:
                yield entry
                index += 1
                continue
            at = self.runs.at(index)
            run = self.runs[at]
            end = self.runs.first[at + 1] if at + 1 < len(self.runs) else self.last_index + 1
            entries = self._read_run(run)
            stop = min(end, last + 1)
            yield from entries[index - run.first : stop - run.first]
            index = stop

    def _read_run(self, run: Run) -> list[Entry]:
        if self._read_back is not None and self._read_back[0] == run:
            return self._read_back[1]
        commands = self._journal.read_commands(run)
        entries = [Entry(run.first + i, run.term, command) for i, command in enumerate(commands)]
        self._read_back = (run, entries)
        return entries

    # -- writing ------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries after the last. Raises ValueError when they do not follow on it."""
        if not entries:
            return
        first, last = entries[0], entries[-1]
        if first.index != self.last_index + 1 or last.index - first.index != len(entries) - 1:
            raise ValueError(f"{self!r} cannot append {first.index}..{last.index}")
        if not self.last_term <= first.term <= last.term:
            raise ValueError(f"{self!r}: terms of appended entries go back")
        if first.term == last.term:
            self._append(entries)
        else:
            for _, part in groupby(entries, key=lambda entry: entry.term):
                self._append(list(part))

    def _append(self, entries: Sequence[Entry]) -> None:
        commands = [entry.command for entry in entries]
        size_bytes = sum(map(len, commands))
        if size_bytes > RUN_BYTES_MAX and len(entries) > 1:
            middle = len(entries) // 2
            self._append(entries[:middle])
            self._append(entries[middle:])
            return
        index, term = entries[0].index, entries[0].term
        record = self._open_append
        if (
            record is not None
            and record.commands is not None
            and record.term == term
            and record.size_bytes + size_bytes <= RUN_BYTES_MAX
        ):
            record.commands += commands
            record.size_bytes += size_bytes
            self.runs.count[-1] += len(commands)
        else:
            self._open_append = self._append_record(fmt.APPEND, index, term, commands)
        self.last_index = entries[-1].index
        self.last_term = term
        self._window.update(zip(range(index, self.last_index + 1), entries, strict=True))
        self._journal.remember(
            self, index, self.last_index, size_bytes + ENTRY_OVERHEAD_BYTES * len(entries)
        )

    def _append_record(self, kind: int, index: int, term: int, commands: list[bytes]) -> Record:
        record = Record(kind, self, term, index)
        record.commands = commands
        record.size_bytes = sum(map(len, commands))
        record.token = self._journal.new_token()
        run = Run(index, term, record.token, 0, 0, len(commands), 0)
        if kind == fmt.APPEND:
            self.runs.add(index, term, record.token, 0, 0, len(commands), 0)
        else:
            self.runs.replace(run, self.first_index, self.last_index)
        self._journal.buffer(record)
        return record

    def truncate_from(self, index: int) -> None:
        """Drop entries index.., which conflict with the leader's. ValueError below the first."""
        if index > self.last_index:
            return
        if index < self.first_index:
            raise ValueError(f"{self!r} cannot truncate from {index}")
        last_term = self.term_at(index - 1)
        self._open_append = None
        for gone in range(index, self.last_index + 1):
            self._window.pop(gone, None)
        self.runs.cut_from(index)
        self.last_index = index - 1
        self.last_term = last_term
        self.durable_index = min(self.durable_index, index - 1)
        self._journal.truncated(self)
        self._journal.buffer(Record(fmt.TRUNCATE, self, term=last_term, index=index))

    def compact_to(self, index: int) -> None:
        """Forget entries ..index. Raises ValueError when they are not durable here."""
        if index < self.first_index:
            return
        if index > self.durable_index:
            raise ValueError(f"{self!r} cannot compact to {index}: durable {self.durable_index}")
        self.base_term = self.term_at(index)
        if self._window:  # in ascending order, so the first key is the lowest
            for gone in range(next(iter(self._window)), index + 1):
                self._window.pop(gone, None)
        self.first_index = index + 1
        if index == self.last_index:
            self.runs.clear()
        else:
            self.runs.cut_before(index + 1)
        self._read_back = None
        self._journal.buffer(Record(fmt.COMPACT, self, term=self.base_term, index=index))

    def set_vote(self, term: int, vote: str | None) -> None:
        """Enter `term` and vote in it. Raises ValueError for a second vote or a lower term."""
        if (term, vote) == (self.term, self.vote):
            return
        if term < self.term or (term == self.term and self.vote is not None):
            raise ValueError(
                f"{self!r} voted for {self.vote} in term {self.term}: not for {vote} in {term}"
            )
        content = b"" if vote is None else vote.encode()
        if len(content) > fmt.VOTE_BYTES_MAX or vote == "":
            raise ValueError("a vote is a node id")
        self.term = term
        self.vote = vote
        self._hard_changes += 1
        self._journal.buffer(Record(fmt.HARD_STATE, self, term=term, content=content))

    @property
    def hard_state_durable(self) -> bool:
        return self._hard_durable == self._hard_changes

    # -- what the journal asks ----------------------------------------------------------

    def state(self) -> fmt.GroupState:
        return fmt.GroupState(
            self.id,
            self.epoch,
            self.first_index,
            self.base_term,
            self.last_index,
            self.last_term,
            self.term,
            self.vote,
        )

    def written(self) -> tuple[int, int]:
        """Close the open record; what the flush that is being written will have made durable."""
        self._open_append = None
        return self.last_index, self._hard_changes

    def flushed(self, last_index: int, hard_changes: int) -> None:
        self.durable_index = max(self.durable_index, min(last_index, self.last_index))
        self._hard_durable = hard_changes

    def evict(self, first: int, last: int) -> bool:
        """Drop entries first..last from the window, unless the disk does not have them yet."""
        if min(last, self.last_index) > self.durable_index:
            return False
        window = self._window
        for index in range(first, last + 1):
            window.pop(index, None)
        return True

    def live_bytes_in(self, segment: int) -> int:
        return sum(self.runs.size[at] for at in self.runs.in_segment(segment))

    def relocate_from(self, segment: int, bytes_max: int) -> int:
        """Write entries of an old segment again; returns how many bytes."""
        moved = 0
        while moved < bytes_max:
            at = next(iter(self.runs.in_segment(segment)), None)
            if at is None:
                break
            run = self.runs[at]
            first = max(run.first, self.first_index)
            end = self.runs.first[at + 1] if at + 1 < len(self.runs) else self.last_index + 1
            commands = [entry.command for entry in self._entries(first, end - 1)]
            record = self._append_record(fmt.RELOCATE, first, run.term, commands)
            moved += record.size_bytes
        return moved
