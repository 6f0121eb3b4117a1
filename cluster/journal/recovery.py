"""Reading a journal back: how far it is whole, and whether what follows may be cut.

The walk goes from the oldest segment that begins with a snapshot, block by block, to the first
one that is not whole. Then one question decides: does anything on the disk (the mark, the
header of any block) say that a later block had been synced? If so, entries that may have been
acknowledged are damaged, and the journal refuses. If not, what follows is a write that the
crash tore, of which nobody was told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

from agentmem_cluster.journal import format as fmt
from agentmem_cluster.journal.format import GroupState, Header, JournalCorrupt
from agentmem_cluster.journal.group import GroupLog
from agentmem_cluster.journal.runs import MISSING, Run
from agentmem_cluster.journal.segments import Segments

if TYPE_CHECKING:
    from agentmem_cluster.journal.journal import Journal

_ZEROS_BYTES = 1 << 18
_MAGIC_BYTES = 12  # magic and segment number, by which a block is looked for


@dataclass(slots=True)
class Recovered:
    """Where the journal goes on, and what was found."""

    groups: dict[int, GroupLog] = field(default_factory=dict)
    sequence: int = 0
    previous_crc: int = 0
    segment: int = 0  # 0: the journal is new
    offset: int = 0
    blocks: int = 0
    cut_reason: str = ""  # why the rest of the last segment was cut; empty when nothing was
    next_number: int = 1
    blank: set[int] = field(default_factory=set)  # segments without a trace of a block of theirs


class _Damaged(Exception):
    """A block that is not whole. Whether that matters is decided at the end of the walk."""


def recover(journal: Journal, segments: Segments, marked: int) -> Recovered:
    """Raises JournalCorrupt."""
    return _Walk(journal, segments, marked).run()


class _Walk:
    def __init__(self, journal: Journal, segments: Segments, marked: int) -> None:
        self._journal = journal
        self._segments = segments
        self._proved = marked  # the highest sequence that something says was synced
        self._found = Recovered()
        self._stopped_at = (journal.path, 0, "there is no segment that begins with a snapshot")

    def run(self) -> Recovered:
        found = self._found
        for number in self._segments.numbers():
            if found.segment and number != found.segment + 1:
                self._look_for_evidence(number, self._read(number), 0)
                continue
            self._walk_segment(number)
        if found.sequence < self._proved:
            file, offset, reason = self._stopped_at
            raise JournalCorrupt(
                file,
                offset,
                f"{reason}, though block {self._proved} had been synced "
                f"(the last whole one is {found.sequence})",
            )
        for group in found.groups.values():
            if group.runs.segment.count(MISSING):
                raise JournalCorrupt(
                    self._segments.name(found.segment),
                    0,
                    f"entries of group {group.id} that it refers to are in no segment",
                )
            group.durable_index = group.last_index
        return found

    def _read(self, number: int) -> bytes:
        return self._segments.file(number).pread(self._segments.size(number), 0)

    def _walk_segment(self, number: int) -> None:
        found = self._found
        data = self._read(number)
        view = memoryview(data)
        at = 0
        reason = ""
        while True:
            try:
                header = self._header(view, at, number)
                self._check_contents(view, at, header)
            except _Damaged as damaged:
                reason = str(damaged)
                break
            if at == 0:
                # A cut is behind us when the next segment goes on from before it.
                found.segment, found.cut_reason = number, ""
            self._replay(view, at, header)
            at += header.block_bytes
            found.offset = at
            found.blocks += 1
            found.sequence = header.sequence
            found.previous_crc = header.crc
            self._proved = max(self._proved, header.synced)
        if at == 0 and found.segment:
            file, offset, stop = self._stopped_at
            reason = f"{stop}, and {self._segments.name(number)} does not go on ({reason})"
            self._stopped_at = (file, offset, reason)
        else:
            self._stopped_at = (self._segments.name(number), at, reason)
        remains = self._look_for_evidence(number, data, at)
        if remains and found.segment == number:
            found.cut_reason = reason

    def _header(self, view: memoryview, at: int, number: int) -> Header:
        """The next block's header, if it is the one that must come next."""
        found = self._found
        header = self._any_header(view, at, number)
        if header is None:
            raise _Damaged("no whole block begins here")
        if bool(header.flags & fmt.FLAG_SNAPSHOT) != (at == 0):
            raise _Damaged("a segment must begin with a snapshot, and have no other")
        if found.segment and (
            header.sequence != found.sequence + 1 or header.previous_crc != found.previous_crc
        ):
            raise _Damaged(f"block {header.sequence} does not follow on block {found.sequence}")
        return header

    def _any_header(self, view: memoryview, at: int, number: int) -> Header | None:
        try:
            return fmt.read_header(view, at, number)
        except fmt.UnsupportedVersion as newer:
            raise JournalCorrupt(
                self._segments.name(number),
                at,
                f"it is written in format {newer}, and this program reads {fmt.VERSION}",
            ) from None

    def _check_contents(self, view: memoryview, at: int, header: Header) -> None:
        content_at = at + fmt.HEADER_BYTES + header.rows * fmt.ROW.size
        table = view[at + fmt.HEADER_BYTES : content_at]
        for row in fmt.ROW.iter_unpack(table):
            end = content_at + row[5]
            if crc32(view[content_at:end]) != row[6]:
                raise _Damaged(f"block {header.sequence} is torn or has flipped bits")
            content_at = end

    def _look_for_evidence(self, number: int, data: bytes, at: int) -> bool:
        """Blocks after the walk's end, whole or not; whole ones say how far was synced."""
        at_start = at == 0
        magic = fmt.HEADER_BODY.pack(fmt.MAGIC, number, *[0] * 7)[:_MAGIC_BYTES]
        view = memoryview(data)
        end = _end_of_data(data, at)
        at = data.find(magic, at, end)
        remains = at >= 0
        if not remains and at_start:
            self._found.blank.add(number)
        while at >= 0:
            header = self._any_header(view, at, number)
            if header is not None:
                self._proved = max(self._proved, header.synced)
            at = data.find(magic, at + 1, end)
        return remains

    # -- replaying ----------------------------------------------------------------------

    def _replay(self, view: memoryview, at: int, header: Header) -> None:
        table_at = at + fmt.HEADER_BYTES
        content_at = table_at + header.rows * fmt.ROW.size
        groups = self._found.groups
        first = self._found.blocks == 0
        try:
            if header.flags & fmt.FLAG_SNAPSHOT and not first:
                self._compare(view, at, header)
                return
            for kind, number, term, index, count, size, crc in fmt.ROW.iter_unpack(
                view[table_at:content_at]
            ):
                if kind == fmt.APPEND:
                    group = groups[number]
                    if index != group.last_index + 1 or term < group.last_term:
                        raise ValueError(f"entry {index} does not follow {group!r}")
                    group.runs.add(index, term, header.segment, content_at, size, count, crc)
                    group.last_index = index + count - 1
                    group.last_term = term
                elif kind == fmt.STATE_OF:
                    state = GroupState.decode(bytes(view[content_at : content_at + size]))
                    self._add_group(number, state)
                elif kind == fmt.DROP:
                    del groups[number]
                else:
                    run = Run(index, term, header.segment, content_at, size, count, crc)
                    content = b"" if kind == fmt.RELOCATE else bytes(view[content_at:][:size])
                    _replay_rare(kind, groups[number], run, content)
                content_at += size
        except (ValueError, KeyError) as wrong:
            raise JournalCorrupt(
                self._segments.name(header.segment),
                at,
                f"block {header.sequence} makes no sense ({wrong})",
            ) from wrong

    def _add_group(self, number: int, state: GroupState) -> None:
        if number in self._found.groups:
            raise ValueError(f"group number {number} is used twice")
        group = GroupLog(self._journal, number, state)
        if state.last_index >= state.first_index:
            # They stand in segments that are gone, so later rows must compact or relocate them.
            group.runs.add(state.first_index, state.last_term, MISSING, 0, 0, 0, 0)
        self._found.groups[number] = group
        self._found.next_number = max(self._found.next_number, number + 1)

    def _compare(self, view: memoryview, at: int, header: Header) -> None:
        """A snapshot inside the walk repeats what was replayed; if not, one of both is wrong."""
        content_at = at + fmt.HEADER_BYTES + header.rows * fmt.ROW.size
        states: dict[int, GroupState] = {}
        table = view[at + fmt.HEADER_BYTES : content_at]
        for _, number, _, _, _, size, _ in fmt.ROW.iter_unpack(table):
            states[number] = GroupState.decode(bytes(view[content_at : content_at + size]))
            content_at += size
        replayed = {number: group.state() for number, group in self._found.groups.items()}
        if states != replayed:
            raise ValueError("the snapshot differs from what the blocks before it say")


def _end_of_data(data: bytes, start: int) -> int:
    """Where the zeros that were allocated ahead begin, roughly: comparing beats searching."""
    zeros = bytes(_ZEROS_BYTES)
    end = len(data)
    while end - _ZEROS_BYTES > start and data[end - _ZEROS_BYTES : end] == zeros:
        end -= _ZEROS_BYTES
    return end


def _replay_rare(kind: int, group: GroupLog, run: Run, content: bytes) -> None:
    if kind == fmt.TRUNCATE:
        if not group.first_index <= run.first <= group.last_index:
            raise ValueError(f"{group!r} is truncated from {run.first}")
        group.runs.cut_from(run.first)
        group.last_index = run.first - 1
        group.last_term = run.term
    elif kind == fmt.HARD_STATE:
        if run.term < group.term:
            raise ValueError(f"{group!r} goes back to term {run.term}")
        group.term = run.term
        group.vote = content.decode() if run.entries else None
    elif kind == fmt.COMPACT:
        if not group.first_index <= run.first <= group.last_index:
            raise ValueError(f"{group!r} is compacted to {run.first}")
        group.first_index = run.first + 1
        group.base_term = run.term
        if run.first == group.last_index:
            group.runs.clear()
        else:
            group.runs.cut_before(run.first + 1)
    elif kind == fmt.RELOCATE:
        group.runs.replace(run, group.first_index, group.last_index)
    else:
        raise ValueError(f"kind {kind} is unknown")
