"""Clocks that jump, system calls that fail, disks that fill up."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import ClassVar

from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.base import Field, Nemesis

CLOCK_JUMPS_S = (-86_400.0, -3_600.0, -30.0, -2.0, 2.0, 30.0, 3_600.0, 86_400.0)
_BLOCK = b"\xa5" * 65_536


class ClockJump(Nemesis):
    name: ClassVar[str] = "clock-jump"
    description: ClassVar[str] = "wall clocks jump by 2 s to a day, forwards or back, and return"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLOCK})

    async def strike(self, field: Field) -> str:
        count = field.chance.randint(1, len(field.nodes))
        chosen = sorted(field.chance.sample(list(field.nodes), count))
        self.victims = frozenset(chosen)
        told = []
        for node in chosen:
            offset_s = field.chance.choice(CLOCK_JUMPS_S)
            await field.hosts.set_clock(node, offset_s)
            told.append(f"{node} {offset_s:+g} s")
        return ", ".join(told)

    async def undo(self, field: Field) -> None:
        for node in self.victims:
            await field.hosts.set_clock(node, 0.0)


class _FailingCalls(Nemesis):
    """A node whose disk fails may stop: it must never acknowledge what it could not write."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FAILING_CALLS})
    may_end_nodes: ClassVar[bool] = True
    wants_whole_cluster: ClassVar[bool] = True
    points: ClassVar[tuple[str, ...]] = ()
    errnos: ClassVar[tuple[int, ...]] = (errno.EIO,)
    probabilities: ClassVar[tuple[float, ...]] = (0.05, 0.5)

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        self.victims = frozenset({node})
        code = field.chance.choice(self.errnos)
        probability = field.chance.choice(self.probabilities)
        for point in self.points:
            await field.hosts.fail_calls(node, point, probability, code)
        names = ", ".join(point.rpartition("/")[2] for point in self.points)
        return f"{names} of {node} fail with {errno.errorcode[code]} ({probability:.0%})"

    async def undo(self, field: Field) -> None:
        for node in self.victims:
            if field.hosts.is_running(node):
                for point in self.points:
                    await field.hosts.fail_calls(node, point, 0.0, 0)
            else:
                await field.hosts.start(node)


class FsyncErrors(_FailingCalls):
    name: ClassVar[str] = "fsync-errors"
    description: ClassVar[str] = "fsync and fdatasync of a leader fail with EIO"
    points: ClassVar[tuple[str, ...]] = ("posix/io/sync/fsync", "posix/io/sync/fdatasync")


class WriteErrors(_FailingCalls):
    name: ClassVar[str] = "write-errors"
    description: ClassVar[str] = "pwrite of a leader fails with EIO or ENOSPC"
    points: ClassVar[tuple[str, ...]] = ("posix/io/rw/pwrite", "posix/io/rw/pwritev")
    errnos: ClassVar[tuple[int, ...]] = (errno.EIO, errno.ENOSPC)


class FullDisk(Nemesis):
    name: ClassVar[str] = "full-disk"
    description: ClassVar[str] = "the disk of a leader fills up to the last block"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SMALL_DISK})
    # A node may stop when even its journal finds no room.
    may_end_nodes: ClassVar[bool] = True
    wants_whole_cluster: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._ballast: Path | None = None

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        self.victims = frozenset({node})
        self._ballast = field.hosts.disk(node) / "ballast"
        size = fill(self._ballast)
        return f"{size / 1e6:.0f} MB filled the disk of {node}"

    async def undo(self, field: Field) -> None:
        if self._ballast is not None:
            self._ballast.unlink(missing_ok=True)
        for node in self.victims:
            if not field.hosts.is_running(node):
                await field.hosts.start(node)


def fill(path: Path) -> int:
    """Write until the disk is full; returns the bytes. Only for a small disk of its own."""
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for block in (_BLOCK, _BLOCK[:4_096]):
            while True:
                try:
                    size += os.write(descriptor, block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break
    finally:
        os.close(descriptor)
    return size
