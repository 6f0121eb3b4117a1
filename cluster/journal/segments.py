"""The journal's files: numbered segments of one size, allocated ahead, used again when dead."""

from __future__ import annotations

import errno
import re

from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.runtime import Disk, File

_NAME = re.compile(r"([0-9]{16})\.seg")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def is_no_space(error: OSError) -> bool:
    return error.errno in _NO_SPACE


class Segments:
    """Open segment files by number. Only the flush thread renames and removes, one at a time."""

    def __init__(self, disk: Disk, path: str, segment_bytes: int) -> None:
        self.disk = disk
        self.path = path
        self.segment_bytes = segment_bytes
        self._files: dict[int, File] = {}
        self._sizes: dict[int, int] = {}
        for name in disk.list(path):
            match = _NAME.fullmatch(name)
            if match is not None:
                self.opened(int(match[1]), disk.open(f"{path}/{name}"))

    def name(self, number: int) -> str:
        return f"{self.path}/{number:016d}.seg"

    def numbers(self) -> list[int]:
        return sorted(self._files)

    def file(self, number: int) -> File:
        return self._files[number]

    def size(self, number: int) -> int:
        return self._sizes[number]

    def has(self, number: int) -> bool:
        return number in self._files

    @property
    def bytes_used(self) -> int:
        return sum(self._sizes.values())

    def make(self, number: int, size_bytes: int) -> File:
        """The file of a segment, with room for `size_bytes`. OSError leaves nothing half open."""
        file = self._files.get(number)
        if file is not None and self._sizes[number] >= size_bytes:
            return file
        file = file or self.disk.open(self.name(number), create=True)
        try:
            file.allocate(max(size_bytes, self.segment_bytes))
        except OSError:
            if number not in self._files:
                file.close()
            raise
        self.opened(number, file)
        return file

    def remove(self, number: int) -> None:
        self.forget(number)
        self.disk.remove(self.name(number))

    def forget(self, number: int) -> None:
        self._files.pop(number).close()
        del self._sizes[number]

    def renamed(self, number: int, new: int) -> None:
        self._files[new] = self._files.pop(number)
        self._sizes[new] = self._sizes.pop(number)

    def opened(self, number: int, file: File) -> None:
        self._files[number] = file
        self._sizes[number] = file.size()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class Tidying:
    """Room for the next segment, and the end of dead ones: slow calls, kept off the loop.

    A dead segment becomes the next one by a new name: its old blocks carry its old number, so
    they mean nothing there.
    """

    def __init__(self, segments: Segments, dead: list[int], next_number: int | None) -> None:
        self._segments = segments
        self._dead = dead  # ascending: what is left after a crash is then a suffix
        self._next = next_number
        self._removed: int | None = None
        self._recycled: int | None = None
        self._made: File | None = None

    def run(self) -> None:
        """In the flush thread."""
        if self._dead:
            # One a flush: giving 64 MiB back takes the file system milliseconds, and replies wait.
            segments, number = self._segments, self._dead[0]
            if self._next is not None and segments.size(number) == segments.segment_bytes:
                failpoint("journal.before_recycle")
                segments.disk.rename(segments.name(number), segments.name(self._next))
                failpoint("journal.after_recycle")
                # Before anything is written to it: a power loss may bring the old name back,
                # and what then stands there must be what stood there.
                segments.disk.sync_dir(segments.path)
                self._recycled = number
            else:
                failpoint("journal.before_remove")
                segments.disk.remove(segments.name(number))
                self._removed = number
            self._dead = self._dead[1:]
        elif self._next is not None and self._made is None:
            self._make_next()

    def _make_next(self) -> None:
        segments = self._segments
        assert self._next is not None
        try:
            file = segments.disk.open(segments.name(self._next), create=True)
        except OSError as refused:
            if not is_no_space(refused):
                raise
            return
        try:
            file.allocate(segments.segment_bytes)
        except OSError as refused:
            file.close()
            if not is_no_space(refused):
                raise
            return
        failpoint("journal.after_allocate")
        self._made = file

    def finish(self) -> list[int]:
        """On the loop, after `run`. Returns the dead segments that are still there."""
        segments = self._segments
        if self._removed is not None:
            segments.forget(self._removed)
        if self._next is not None:
            if self._recycled is not None:
                segments.renamed(self._recycled, self._next)
            elif self._made is not None:
                segments.opened(self._next, self._made)
        return self._dead
