"""Checkpoints on their way to the disk: one at a time, and again later when there was no room.

The groups of a node take turns, the one whose last turn is longest ago first. To begin all that
are due at once would hold up the loop, and pin in each the pages of a snapshot that is not being
written yet.

A state machine hands out one job at a time and is only told when it is done. So a job that met a
full disk is kept and run again, as it is: the checkpoint before stays whole until it succeeds.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from agentmem_cluster.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether an operation failed for want of room, which passes, and not of a broken disk."""
    return isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL)


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointJob:
    group_id: str
    job: Any


class Checkpoints:
    """The checkpoints of all groups of a node: due, under way, waiting for room."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._due: dict[str, float] = {}  # the longest without a turn first
        self._under_way: dict[str, CheckpointJob] = {}
        self._to_run: list[CheckpointJob] = []
        self._waiting: dict[str, float] = {}  # for room, until then

    def due(self, group_id: str, at_s: float) -> None:
        """When the group wants its next turn; infinity: it does not."""
        self._due[group_id] = at_s

    def turn(self, now_s: float) -> str | None:
        """The group to begin a checkpoint of, if there is one and none is being made."""
        if self._is_busy:
            return None
        return next((group_id for group_id, at_s in self._due.items() if at_s <= now_s), None)

    @property
    def _is_busy(self) -> bool:
        return len(self._under_way) > len(self._waiting)

    def begin(self, group_id: str, job: Any) -> None:
        """The group has had its turn. It had nothing to do when `job` is None."""
        self._due.pop(group_id, None)
        self._due[group_id] = float("inf")
        if job is None:
            return
        checkpoint = self._under_way[group_id] = CheckpointJob(group_id, job)
        self._to_run.append(checkpoint)

    def tick(self, now_s: float) -> None:
        for group_id, at_s in list(self._waiting.items()):
            if at_s <= now_s:
                del self._waiting[group_id]
                self._to_run.append(self._under_way[group_id])

    def next_wakeup(self) -> float:
        soonest = min(self._waiting.values(), default=float("inf"))
        return soonest if self._is_busy else min(soonest, *self._due.values(), float("inf"))

    def take(self) -> list[CheckpointJob]:
        """What is to be run now."""
        taken, self._to_run = self._to_run, []
        return taken

    def done(self, checkpoint: CheckpointJob) -> bool:
        """False: its group has left this node since, and perhaps come back with other members."""
        if self._under_way.get(checkpoint.group_id) is not checkpoint:
            return False
        del self._under_way[checkpoint.group_id]
        return True

    def without_room(self, checkpoint: CheckpointJob, now_s: float) -> bool:
        """To be run again. True when it is the first of all that waits."""
        if self._under_way.get(checkpoint.group_id) is not checkpoint:
            return False
        first = not self._waiting
        self._waiting[checkpoint.group_id] = now_s + self._retry_s
        return first

    def forget(self, group_id: str) -> None:
        """The group leaves this node."""
        self._due.pop(group_id, None)
        self._under_way.pop(group_id, None)
        self._waiting.pop(group_id, None)
        self._to_run = [c for c in self._to_run if c.group_id != group_id]
