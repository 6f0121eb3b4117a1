"""Committed entries reach the state machine, in order, in batches, once; then the log may shrink.

The state machine never raises over a bad command: that is a result. If it raises, the local disk
or memory has failed and the node stops. It is not retried: a retry applies the first part of a
batch twice (pysyncobj retries for ever and wedges the group, D5). The one exception is a full
disk, which the state machine reports before it has changed anything: the batch waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from agentmem_cluster.errors import DiskFull, StateDamaged
from agentmem_cluster.raft.api import Entry, StateMachine
from agentmem_cluster.raft.settings import RaftSettings

# The log's size is known to this precision.
MARK_BYTES = 256 << 10
ENTRY_OVERHEAD_BYTES = 48
# What an entry is taken to weigh that was written before this process started.
GUESSED_ENTRY_BYTES = 512


class KeptLog(Protocol):
    first_index: int
    last_index: int
    durable_index: int

    def slice(self, first: int, last: int, bytes_max: int) -> list[Entry]: ...
    def compact_to(self, index: int) -> None: ...


class LogBehind(Exception):
    """The journal lacks entries that the state machine has, or needs."""


def check_continues(log: KeptLog, machine: StateMachine, group_id: str) -> None:
    """Refuse to start when the journal and the state machine do not belong together."""
    applied = machine.applied_index
    if applied > log.last_index:
        raise LogBehind(
            f"group {group_id}: the state has entry {applied}, the journal ends at "
            f"{log.last_index}: the journal of this node was lost or replaced. Restore it, or "
            f"empty the node's data directory and let the cluster re-seed it"
        )
    if applied < log.first_index - 1:
        raise LogBehind(
            f"group {group_id}: the state ends at entry {applied}, the journal begins at "
            f"{log.first_index}: the state of this node was lost or replaced by an older one. "
            f"Restore it, or empty the node's data directory and let the cluster re-seed it"
        )


class Applier:
    """Feeds one state machine from one log."""

    def __init__(self, log: KeptLog, machine: StateMachine, settings: RaftSettings, now_s: float):
        self._log = log
        self._machine = machine
        self._settings = settings
        self._bytes = 0  # of the log up to applied_index, counted from its beginning
        self._marks: deque[tuple[int, int]] = deque()
        self._since_entries = 0
        self._since_bytes = 0
        self._checkpointing = False
        self._checkpoint_soon = False
        self.retained: int | None = None  # entries after it are asked for by others than members
        # Why it applies nothing now. It still votes, and keeps what the leader sends.
        self.stalled: DiskFull | StateDamaged | None = None
        self._retry_s = 0.0
        step = MARK_BYTES // GUESSED_ENTRY_BYTES
        for index in range(log.first_index - 1, machine.applied_index + 1, step):
            self._bytes = (index - log.first_index + 1) * GUESSED_ENTRY_BYTES
            self._marks.append((index, self._bytes))
        self.applied_index = machine.applied_index
        self._checkpointed_s = now_s

    def step(self, commit_index: int, now_s: float) -> tuple[Sequence[Entry], Sequence[Any]]:
        """Apply one batch of what is committed *and* synced here. Both empty: nothing to do."""
        last = min(commit_index, self._log.durable_index)
        first = self.applied_index + 1
        if last < first or now_s < self.retry_s():
            return (), ()
        last = min(last, first + self._settings.apply_entries_max - 1)
        entries = self._log.slice(first, last, self._settings.apply_bytes_max)
        try:
            results = self._machine.apply(entries)
        except (DiskFull, StateDamaged) as error:
            self.stalled = error
            self._retry_s = now_s + self._settings.disk_retry_s
            return (), ()
        self.stalled = None
        end = entries[-1].index
        if len(results) != len(entries) or self._machine.applied_index != end:
            raise RuntimeError(
                f"the state machine answered {len(results)} results for {len(entries)} entries "
                f"and stands at {self._machine.applied_index}, not at {end}"
            )
        self.applied_index = end
        size = sum([len(entry.command) for entry in entries]) + ENTRY_OVERHEAD_BYTES * len(entries)
        self._bytes += size
        self._since_bytes += size
        self._since_entries += len(entries)
        if not self._marks or self._bytes - self._marks[-1][1] >= MARK_BYTES:
            self._marks.append((end, self._bytes))
        return entries, results

    @property
    def is_damaged(self) -> bool:
        """Only a copy of another member's state helps."""
        return isinstance(self.stalled, StateDamaged)

    def retry_s(self) -> float:
        """When a batch that met a full disk is tried again."""
        return self._retry_s if self.stalled is not None else float("-inf")

    # -- checkpoints: the state machine's own durability --

    def checkpoint(self, now_s: float) -> Any:
        """A job when enough was applied since the last one, or when it was long ago."""
        if self._checkpointing or now_s < self.checkpoint_due_s():
            return None
        self._checkpointed_s = now_s
        self._since_entries = self._since_bytes = 0
        self._checkpoint_soon = False
        job = self._machine.checkpoint()
        self._checkpointing = job is not None
        return job

    def checkpoint_due_s(self) -> float:
        settings = self._settings
        if self._checkpointing:
            return float("inf")
        if self._checkpoint_soon:
            return float("-inf")
        if not self._since_entries:
            return float("inf")
        if (
            self._since_bytes >= settings.checkpoint_bytes
            or self._since_entries >= settings.checkpoint_entries
        ):
            return float("-inf")
        return self._checkpointed_s + settings.checkpoint_s

    def checkpoint_soon(self) -> None:
        """Somebody waits for the present state to be durable."""
        self._checkpoint_soon = True

    def checkpointed(self, job: Any) -> None:
        self._checkpointing = False
        self._machine.checkpoint_done(job)

    # -- compaction --

    def compact(self, floor: int) -> bool:
        """Drop what is durable in the state machine, but for a tail for followers behind.

        `floor` is what every connected follower has. True when something was dropped.
        """
        settings = self._settings
        if self.retained is not None:
            floor = min(floor, self.retained)
        tail = self._index_before(settings.tail_bytes)
        if floor < tail:
            tail = max(floor, self._index_before(settings.tail_bytes_max))
        target = min(self._machine.durable_index, tail)
        if target < self._log.first_index:
            return False
        self._log.compact_to(target)
        while len(self._marks) > 1 and self._marks[1][0] <= target:
            self._marks.popleft()
        return True

    def _index_before(self, bytes_after: int) -> int:
        """The last index with at least that many bytes of log after it; 0 when there is none."""
        found = 0
        for index, total in self._marks:
            if self._bytes - total < bytes_after:
                break
            found = index
        return found
