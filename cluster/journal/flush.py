"""One flush on its way to the disk, and the counters of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.journal.segments import Tidying
from agentmem_cluster.runtime import File

if TYPE_CHECKING:
    from agentmem_cluster.journal.group import GroupLog
    from agentmem_cluster.journal.journal import Journal

_SLOWEST_OF_S = 60.0


class Stage(Enum):
    WRITTEN = "written"
    RUNNING = "running"
    SYNCED = "synced"
    FAILED = "failed"


class FlushJob:
    """What one flush wrote. `run` makes it durable, and may be called in another thread."""

    def __init__(self, journal: Journal, tidying: Tidying) -> None:
        self._journal = journal
        self.stage = Stage.WRITTEN
        self.tidying = tidying
        self.file: File | None = None  # None: nothing was written, there is only tidying to do
        self.erased_file: File | None = None  # where a write that found no room was erased
        self.data = b""
        self.offset = 0
        self.sequence = 0
        self.new_segment = False
        self.covers: dict[GroupLog, tuple[int, int]] = {}  # last index, hard state changes
        self.oldest_needed: int | None = None
        self.sync_s = 0.0

    def run(self) -> None:
        """Raises OSError; after ENOSPC `begin_flush` writes the same again."""
        self.stage = Stage.RUNNING
        try:
            if self.file is not None:
                self._sync(self.file)
            self.tidying.run()
        except BaseException:
            self.stage = Stage.FAILED
            raise
        self.stage = Stage.SYNCED

    def _sync(self, file: File) -> None:
        begun_s = self._journal.now_s()
        if self.erased_file is not None:
            self.erased_file.datasync()
        failpoint("journal.before_sync")
        file.datasync()
        failpoint("journal.after_sync")
        if self.new_segment:
            failpoint("journal.before_dir_sync")
            self._journal.sync_names()
            failpoint("journal.after_dir_sync")
        self.sync_s = self._journal.now_s() - begun_s
        self._journal.mark(self.sequence)


@dataclass(slots=True)
class JournalStats:
    """Counters since the journal was opened; `sync_seconds_max` is of the last minute or two."""

    size_bytes: int = 0
    segments: int = 0
    written_bytes: int = 0
    syncs: int = 0
    sync_seconds: float = 0.0
    sync_seconds_max: float = 0.0


class Counters:
    def __init__(self, now_s: float) -> None:
        self._stats = JournalStats()
        self._slowest = (0.0, 0.0)  # of the minute before, and of this one
        self._minute_began_s = now_s

    def count(self, job: FlushJob, now_s: float) -> None:
        stats = self._stats
        stats.syncs += 1
        stats.written_bytes += len(job.data)
        stats.sync_seconds += job.sync_s
        if now_s - self._minute_began_s > _SLOWEST_OF_S:
            self._minute_began_s = now_s
            self._slowest = (self._slowest[1], 0.0)
        self._slowest = (self._slowest[0], max(self._slowest[1], job.sync_s))

    def stats(self, size_bytes: int, segments: int) -> JournalStats:
        self._stats.size_bytes = size_bytes
        self._stats.segments = segments
        self._stats.sync_seconds_max = max(self._slowest)
        return self._stats
