"""One journal for all replica groups of a node: they share its writes and its syncs.

    group.append(...), group.set_vote(...)      buffered, on the loop
    job = journal.begin_flush()                 one write of all that is buffered, on the loop
    job.run()                                   one datasync, in a thread
    journal.flushed(job)                        durable_index moves, on the loop

`agentmem_cluster.journal.format` says what the bytes are, `recovery` how they are read back.
"""

from __future__ import annotations

from collections import deque
from zlib import crc32

from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.journal import format as fmt
from agentmem_cluster.journal.flush import Counters, FlushJob, JournalStats, Stage
from agentmem_cluster.journal.format import GroupState, JournalCorrupt
from agentmem_cluster.journal.group import GroupLog, Record
from agentmem_cluster.journal.recovery import Recovered, recover
from agentmem_cluster.journal.runs import TOKEN_BASE, Run
from agentmem_cluster.journal.segments import Segments, Tidying, is_no_space
from agentmem_cluster.runtime import Clock, Disk

__all__ = ["FlushJob", "GroupLog", "Journal", "JournalCorrupt", "JournalStats"]

SEGMENT_BYTES = 64 << 20
# Entries kept in memory for followers that are a moment behind. Older ones are read back from
# the page cache, at about 1 us each, so a larger window would only cost resident memory.
WINDOW_BYTES = 4 << 20
# A segment is worth emptying by hand when this little of it is alive.
_LEFTOVER_PART = 4
_RELOCATED_BYTES_MAX = 4 << 20
_SEGMENTS_KEPT = 2


class Journal:
    """Made by `open`. `recovered` says what recovery found, and what it cut."""

    def __init__(
        self, disk: Disk, path: str, segment_bytes: int, window_bytes: int, clock: Clock | None
    ) -> None:
        self.path = path
        self._disk = disk
        self._clock = clock
        self._counters = Counters(self.now_s())
        self._window_bytes_max = window_bytes
        self._segments = Segments(disk, path, segment_bytes)
        mark_name = f"{path}/synced"
        self._mark = disk.open(mark_name, create=True)
        self.recovered: Recovered = recover(
            self, self._segments, fmt.decode_mark(self._mark.pread(fmt.MARK_BYTES, 0))
        )
        found = self.recovered
        self._by_number = found.groups
        self._groups = {(g.id, g.epoch): g for g in found.groups.values()}
        self._next_number = found.next_number
        self._next_token = TOKEN_BASE
        self._sequence = found.sequence
        self._synced = found.sequence
        self._previous_crc = found.previous_crc
        self._segment = found.segment
        self._offset = found.offset
        self._must_roll = not found.segment or bool(found.cut_reason)
        self._half_written: tuple[int, int] | None = None  # where a write failed
        self._pending: list[Record] = []
        self._pending_by_token: dict[int, Record] = {}
        self._written = {number: g.state() for number, g in found.groups.items()}
        self._flight: FlushJob | None = None
        self._window: deque[tuple[GroupLog, int, int, int]] = deque()
        self._window_bytes = 0
        self._needs_changed = True  # an older segment may have become unneeded
        self._oldest_needed = 0
        self._dead: list[int] = []
        self._make_durable()

    @classmethod
    def open(
        cls,
        disk: Disk,
        path: str = "journal",
        *,
        segment_bytes: int = SEGMENT_BYTES,
        window_bytes: int = WINDOW_BYTES,
        clock: Clock | None = None,
    ) -> Journal:
        """Recover the journal, or begin one.

        Cuts what a crash tore. Raises JournalCorrupt when what may have been acknowledged is
        damaged. `clock` is for `stats` only.
        """
        if not disk.exists(path):
            disk.make_dir(path)
            disk.sync_dir(path.rpartition("/")[0])
        return cls(disk, path, segment_bytes, window_bytes, clock)

    def _make_durable(self) -> None:
        """What was read may stand in the page cache only, which a power loss would not keep."""
        failpoint("journal.recovered")
        found = self.recovered
        for number in self._segments.numbers():
            if number < found.segment:
                continue
            if number == found.segment:
                self._segments.file(number).datasync()
            elif number != found.segment + 1 or number not in found.blank:
                self._segments.remove(number)
        self._segments.disk.sync_dir(self.path)
        if found.sequence:
            self.mark(found.sequence)

    # -- groups -------------------------------------------------------------------------

    def group(self, group_id: str, epoch: int, base_index: int = 0, base_term: int = 0) -> GroupLog:
        """The log of a group; when there is none yet, a fresh one that begins after the base."""
        group = self._groups.get((group_id, epoch))
        if group is None:
            state = GroupState(
                group_id,
                epoch,
                first_index=base_index + 1,
                base_term=base_term,
                last_index=base_index,
                last_term=base_term,
                term=base_term,
            )
            group = GroupLog(self, self._next_number, state)
            self._next_number += 1
            self._groups[group_id, epoch] = self._by_number[group.number] = group
            self.buffer(Record(fmt.STATE_OF, group, content=state.encode()))
        return group

    def groups(self) -> list[tuple[str, int]]:
        return sorted(self._groups)

    def drop_group(self, group_id: str, epoch: int) -> None:
        group = self._groups.pop((group_id, epoch), None)
        if group is not None:
            del self._by_number[group.number]
            self.buffer(Record(fmt.DROP, group))

    @property
    def bytes_used(self) -> int:
        """On disk, room that was allocated ahead included."""
        return self._segments.bytes_used

    # -- flushing -----------------------------------------------------------------------

    def begin_flush(self) -> FlushJob | None:
        """Write all that is buffered; None when there is nothing to do.

        OSError(ENOSPC) leaves every buffer as it was: call again when there may be room. The
        next flush may begin when the job ran and `flushed` was called, or when its run failed
        with ENOSPC: then it writes the same bytes again.
        """
        job = self._flight
        if job is not None:
            if job.stage is not Stage.FAILED:
                raise RuntimeError("a flush is in flight")
            if job.file is not None:
                job.file.pwrite(job.data, job.offset)
            return job
        if not self._pending and not self._dead:
            return None
        job = FlushJob(self, Tidying(self._segments, [], None))
        if self._pending:
            self._write(job)
        job.tidying = self._tidying()
        self._flight = job
        return job

    def flushed(self, job: FlushJob) -> None:
        """Note that `job` ran: what it covers is durable."""
        if job is not self._flight or job.stage is not Stage.SYNCED:
            raise RuntimeError("that flush did not run, or is not the one in flight")
        self._flight = None
        self._dead = job.tidying.finish()
        if job.file is None:
            return
        self._synced = job.sequence
        self._counters.count(job, self.now_s())
        for group, (last_index, hard_changes) in job.covers.items():
            group.flushed(last_index, hard_changes)
        if job.oldest_needed is not None:
            self._oldest_needed = job.oldest_needed
        self._evict()

    def _write(self, job: FlushJob) -> None:
        rows, contents = [], []
        for record in self._pending:
            row, content = record.encode()
            rows.append(row)
            contents.append(content)
        segment, offset = self._segment, self._offset
        sequence, previous = self._sequence, self._previous_crc
        block, crc = self._block(segment, sequence + 1, previous, rows, contents)
        head = b""
        if self._must_roll or offset + len(block) > self._segments.size(segment):
            failpoint("journal.before_roll")
            segment, offset = segment + 1, 0
            head, previous = self._snapshot(segment, sequence + 1, previous)
            sequence += 1
            block, crc = self._block(segment, sequence + 1, previous, rows, contents)
            job.new_segment = True
        job.data = head + block
        job.offset = offset
        job.file = self._segments.make(segment, offset + len(job.data))
        self._erase_half_written(job, segment)
        self._half_written = (segment, offset)
        failpoint("journal.before_write")
        job.file.pwrite(job.data, offset)
        failpoint("journal.after_write")
        # Nothing above changed the journal, so an OSError left it as it was.
        self._half_written = None
        job.sequence = self._sequence = sequence + 1
        self._previous_crc = crc
        self._segment, self._offset = segment, offset + len(job.data)
        self._must_roll = False
        content_at = offset + len(head) + fmt.HEADER_BYTES + len(rows) * fmt.ROW.size
        self._note_written(job, rows, content_at)

    def _erase_half_written(self, job: FlushJob, segment: int) -> None:
        """A write that found no room may be whole but for zeros: it must not be read as a block
        when the same sequence goes to another segment."""
        if self._half_written is not None and self._half_written[0] != segment:
            old, offset = self._half_written
            if self._segments.has(old):
                job.erased_file = self._segments.file(old)
                job.erased_file.pwrite(bytes(fmt.HEADER_BYTES), offset)

    def _block(
        self, segment: int, sequence: int, previous: int, rows: list[bytes], contents: list[bytes]
    ) -> tuple[bytes, int]:
        return fmt.encode_block(segment, sequence, self._synced, previous, rows, contents)

    def _snapshot(self, segment: int, sequence: int, previous: int) -> tuple[bytes, int]:
        """The first block of a segment: with it, no older segment is needed for what it says."""
        contents = [state.encode() for state in self._written.values()]
        rows = [
            fmt.encode_row(fmt.STATE_OF, number, 0, 0, 1, content)
            for number, content in zip(self._written, contents, strict=True)
        ]
        return fmt.encode_block(
            segment, sequence, self._synced, previous, rows, contents, fmt.FLAG_SNAPSHOT
        )

    def _note_written(self, job: FlushJob, rows: list[bytes], content_at: int) -> None:
        for record, row in zip(self._pending, rows, strict=True):
            group = record.group
            _, _, _, _, count, size, crc = fmt.ROW.unpack(row)
            if record.commands is not None:
                where = Run(record.index, record.term, self._segment, content_at, size, count, crc)
                group.runs.place(record.index, record.token, where)
            elif record.kind == fmt.DROP:
                self._written.pop(group.number, None)
                self._needs_changed = True
            else:
                self._needs_changed |= record.kind in (fmt.TRUNCATE, fmt.COMPACT)
            content_at += size
            job.covers[group] = (0, 0)
        for group in job.covers:
            job.covers[group] = group.written()
            if group.number in self._by_number:
                self._written[group.number] = group.state()
        self._pending = []
        if self._pending_by_token:
            self._pending_by_token.clear()
            self._needs_changed = True
        if self._needs_changed:
            self._needs_changed = False
            job.oldest_needed = min(
                (g.runs.oldest_segment() or self._segment for g in self._by_number.values()),
                default=self._segment,
            )

    def _tidying(self) -> Tidying:
        following = self._segment + 1
        wanted = (
            self._segment > 0
            and not self._segments.has(following)
            and (bool(self._dead) or 2 * self._offset > self._segments.segment_bytes)
        )
        return Tidying(self._segments, list(self._dead), following if wanted else None)

    def stats(self) -> JournalStats:
        return self._counters.stats(self.bytes_used, len(self._segments.numbers()))

    def now_s(self) -> float:
        return 0.0 if self._clock is None else self._clock.monotonic()

    def sync_names(self) -> None:
        self._disk.sync_dir(self.path)

    def mark(self, sequence: int) -> None:
        """Say that blocks ..sequence are synced. Not synced itself: it is evidence, no promise."""
        try:
            failpoint("journal.before_mark")
            self._mark.pwrite(fmt.encode_mark(sequence), 0)
            failpoint("journal.after_mark")
        except OSError as refused:
            if not is_no_space(refused):
                raise

    # -- space --------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Give up segments that hold nothing alive; the next flush removes or reuses them.

        When little of the oldest one is alive (the log of a group that is idle), that is written
        again at the end, so that the segment can go once the flush is durable.
        """
        numbers = [n for n in self._segments.numbers() if n <= self._segment]
        for number in numbers:
            if number < min(self._oldest_needed, self._segment) and number not in self._dead:
                self._dead.append(number)
        alive = [n for n in numbers if n not in self._dead]
        if len(alive) <= _SEGMENTS_KEPT or self._pending_by_token:
            return
        groups = self._by_number.values()
        live = sum(g.live_bytes_in(alive[0]) for g in groups)
        if live * _LEFTOVER_PART > self._segments.size(alive[0]) and not self._mostly_dead(alive):
            return
        left = _RELOCATED_BYTES_MAX
        for group in groups:
            if left > 0:
                left -= group.relocate_from(alive[0], left)
        self._needs_changed = True

    def _mostly_dead(self, alive: list[int]) -> bool:
        live = sum(sum(g.runs.size) for g in self._by_number.values())
        return 2 * live < sum(self._segments.size(number) for number in alive)

    def close(self) -> None:
        """Buffered records that were not flushed are lost, as in a crash."""
        self._segments.close()
        self._mark.close()

    # -- what the logs of groups ask ----------------------------------------------------

    def buffer(self, record: Record) -> None:
        self._pending.append(record)
        if record.kind == fmt.RELOCATE:
            self._pending_by_token[record.token] = record

    def new_token(self) -> int:
        self._next_token += 1
        return self._next_token

    def truncated(self, group: GroupLog) -> None:
        """Entries that are being flushed will not count as durable when they were replaced."""
        if self._flight is not None and group in self._flight.covers:
            last_index, hard_changes = self._flight.covers[group]
            self._flight.covers[group] = (min(last_index, group.last_index), hard_changes)

    def remember(self, group: GroupLog, first: int, last: int, size_bytes: int) -> None:
        self._window.append((group, first, last, size_bytes))
        self._window_bytes += size_bytes

    def _evict(self) -> None:
        while self._window_bytes > self._window_bytes_max:
            group, first, last, size_bytes = self._window[0]
            if not group.evict(first, last):
                return
            self._window.popleft()
            self._window_bytes -= size_bytes

    def read_commands(self, run: Run) -> list[bytes]:
        """The commands of a row. Raises JournalCorrupt."""
        if run.segment > TOKEN_BASE:
            waiting = self._pending_by_token[run.segment].commands
            assert waiting is not None
            return waiting
        content = self._segments.file(run.segment).pread(run.size, run.offset)
        name = self._segments.name(run.segment)
        if crc32(content) != run.crc:
            raise JournalCorrupt(name, run.offset, f"entries {run.first}.. read back are damaged")
        try:
            return fmt.decode_commands(content, run.entries)
        except ValueError as wrong:
            raise JournalCorrupt(name, run.offset, str(wrong)) from wrong
