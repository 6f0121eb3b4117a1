"""A disk that tells the truth about what a crash keeps.

What a process wrote lives in the page cache and survives `kill`. Only what was synced survives
`power_loss`: of everything else an arbitrary part may have reached the platter, in any order
and torn at sectors, because the kernel writes back when and what it likes. A name (created,
renamed, removed) is durable only once its directory was synced, however well its file was.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

SECTOR_BYTES = 512


@dataclass(slots=True)
class _Change:
    """One unsynced change of a file: bytes at an offset, or a new size."""

    offset: int
    data: bytes
    size: int | None = None


def _apply(target: bytearray, change: _Change) -> None:
    if change.size is not None:
        if change.size < len(target):
            del target[change.size :]
        else:
            target.extend(bytes(change.size - len(target)))
        return
    end = change.offset + len(change.data)
    if end > len(target):
        target.extend(bytes(end - len(target)))
    target[change.offset : end] = change.data


@dataclass(slots=True, eq=False)
class _Content:
    """One file's bytes: as the page cache shows them, and as the platter holds them."""

    cached: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[_Change] = field(default_factory=list)

    def settle(self) -> None:
        for change in self.unsynced:
            _apply(self.durable, change)
        self.unsynced.clear()


class SimFile:
    """Implements `agentmem_cluster.runtime.File`. Dead once its process is."""

    def __init__(self, disk: SimDisk, path: str, content: _Content) -> None:
        self._disk = disk
        self._path = path
        self._content = content
        self._boot = disk.boot
        self._open = True

    def _check(self) -> None:
        if not self._open or self._boot != self._disk.boot:
            raise OSError(errno.EBADF, "file of a dead process or closed", self._path)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        self._check()
        return bytes(self._content.cached[offset : offset + size_bytes])

    def pwrite(self, data: bytes, offset: int) -> None:
        self._check()
        written = self._disk.admit(len(data), self._path)
        self._change(_Change(offset, bytes(data[:written])))
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)

    def datasync(self) -> None:
        self._check()
        content = self._content
        try:
            self._disk.before_sync(self._path)
        except OSError:
            # Linux marks the pages clean after a failed fsync: they are neither on the
            # platter nor tried again, and vanish when the cache drops them.
            content.unsynced.clear()
            content.cached = bytearray(content.durable)
            raise
        self._disk.syncs += 1
        if self._disk.honours_sync and self._disk.syncs_at_once:
            self._disk.durable_version += 1
            content.settle()

    def allocate(self, size_bytes: int) -> None:
        self._check()
        if size_bytes > len(self._content.cached):
            if self._disk.admit(1, self._path) < 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
            self._change(_Change(0, b"", size_bytes))

    def truncate(self, size_bytes: int) -> None:
        self._check()
        self._change(_Change(0, b"", size_bytes))

    def size(self) -> int:
        self._check()
        return len(self._content.cached)

    def close(self) -> None:
        self._open = False

    def _change(self, change: _Change) -> None:
        _apply(self._content.cached, change)
        self._content.unsynced.append(change)


class SimDisk:
    """Implements `agentmem_cluster.runtime.Disk`. `honours_sync=False` is a disk that lies."""

    def __init__(self, chance: random.Random, *, honours_sync: bool = True) -> None:
        self._chance = chance
        self.honours_sync = honours_sync
        self.syncs_at_once = True  # False: a sync returns first and works when `settle` is called
        self.boot = 0
        self.syncs = 0
        self.durable_version = 0  # counts changes of what is durable
        self.full = False
        self.fail_next_sync = False
        self._names: dict[str, _Content] = {}
        self._durable_names: dict[str, _Content] = {}
        self._dirs: set[str] = {""}
        self._durable_dirs: set[str] = {""}
        # Unsynced changes of names, in order: (directory, what to do to the durable names).
        self._unsynced_names: list[tuple[str, Callable[[], None]]] = []

    # -- the interface of runtime.Disk --

    def open(self, path: str, *, create: bool = False) -> SimFile:
        path = _clean(path)
        content = self._names.get(path)
        if content is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self._need_dir(_parent(path))
            if self.admit(1, path) < 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            created = content = self._names[path] = _Content()
            self._rename_later(path, lambda: self._durable_names.__setitem__(path, created))
        return SimFile(self, path, content)

    def list(self, path: str) -> list[str]:
        prefix = f"{_clean(path)}/".lstrip("/")
        below = {
            name.removeprefix(prefix).split("/")[0]
            for name in (*self._names, *self._dirs)
            if name.startswith(prefix) and name != prefix.rstrip("/") and name
        }
        return sorted(below)

    def exists(self, path: str) -> bool:
        path = _clean(path)
        return path in self._names or path in self._dirs

    def make_dir(self, path: str) -> None:
        path = _clean(path)
        if path in self._dirs:
            return
        if _parent(path) not in self._dirs:
            self.make_dir(_parent(path))
        self._dirs.add(path)
        self._rename_later(path, lambda: self._durable_dirs.add(path))

    def rename(self, old: str, new: str) -> None:
        old, new = _clean(old), _clean(new)
        if old not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        self._need_dir(_parent(new))
        content = self._names[new] = self._names.pop(old)

        def durably() -> None:
            self._durable_names.pop(old, None)
            self._durable_names[new] = content

        self._rename_later(new, durably)

    def remove(self, path: str) -> None:
        path = _clean(path)
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        del self._names[path]

        def durably() -> None:
            self._durable_names.pop(path, None)

        self._rename_later(path, durably)

    def sync_dir(self, path: str) -> None:
        path = _clean(path)
        self._need_dir(path)
        self.before_sync(path)
        self.syncs += 1
        if not self.honours_sync:
            return
        self.durable_version += 1
        # A journalling file system commits names in order: syncing one directory also
        # commits every earlier change of a name.
        last = max(
            (i for i, (where, _) in enumerate(self._unsynced_names) if where == path), default=-1
        )
        for _, durably in self._unsynced_names[: last + 1]:
            durably()
        del self._unsynced_names[: last + 1]

    def free_bytes(self) -> int:
        return 0 if self.full else 1 << 30

    # -- faults --

    def admit(self, size_bytes: int, path: str) -> int:
        """How many of `size_bytes` still fit; a full disk may take the first part of a write."""
        if self.full:
            return self._chance.randrange(size_bytes) if size_bytes > 1 else 0
        return size_bytes

    def before_sync(self, path: str) -> None:
        """Raise instead of syncing, once, when a failure was ordered."""
        if self.fail_next_sync:
            self.fail_next_sync = False
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def settle(self) -> None:
        self.durable_version += 1
        for content in self._names.values():
            content.settle()

    def kill(self) -> None:
        """The process dies; the page cache lives on."""
        self.boot += 1

    def power_loss(self) -> None:
        """The machine dies: what was not synced survives in part, in any order, torn."""
        self.kill()
        self.durable_version += 1
        chance = self._chance
        in_order = chance.random() < 0.4
        reached = chance.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        kept = int(len(self._unsynced_names) * chance.random() + 0.5)
        for _, durably in self._unsynced_names[:kept]:
            durably()
        self._unsynced_names.clear()
        for content in self._durable_names.values():
            if content.unsynced:
                self._write_back(content, in_order, reached)
            content.unsynced.clear()
            content.cached = bytearray(content.durable)
        self._names = {
            path: content
            for path, content in self._durable_names.items()
            if _parent(path) in self._durable_dirs
        }
        self._durable_names = dict(self._names)
        self._dirs = set(self._durable_dirs)

    def platter(self) -> SimDisk:
        """A disk that holds what is durable now and nothing else: the worst a power loss leaves."""
        copy = SimDisk(self._chance)
        copy._durable_dirs = set(self._durable_dirs)
        for path, content in self._durable_names.items():
            if _parent(path) in self._durable_dirs:
                durable = bytearray(content.durable)
                copy._durable_names[path] = _Content(bytearray(durable), durable)
        copy._names = dict(copy._durable_names)
        copy._dirs = set(copy._durable_dirs)
        return copy

    def _write_back(self, content: _Content, in_order: bool, reached: float) -> None:
        chance = self._chance
        if in_order:
            kept = chance.randrange(len(content.unsynced) + 1)
            for change in content.unsynced[:kept]:
                _apply(content.durable, change)
            if kept < len(content.unsynced) and content.unsynced[kept].size is None:
                torn = content.unsynced[kept]
                sectors = chance.randrange(len(torn.data) // SECTOR_BYTES + 1)
                part = torn.data[: sectors * SECTOR_BYTES + chance.choice([0, 0, 1, 7, 100])]
                if part:
                    _apply(content.durable, _Change(torn.offset, part))
            return
        for change in content.unsynced:
            if change.size is not None:
                if chance.random() < reached:
                    _apply(content.durable, change)
                continue
            position = change.offset
            end = change.offset + len(change.data)
            while position < end:
                stop = min(end, (position // SECTOR_BYTES + 1) * SECTOR_BYTES)
                if chance.random() < reached:
                    part = change.data[position - change.offset : stop - change.offset]
                    _apply(content.durable, _Change(position, part))
                position = stop

    # -- names --

    def _need_dir(self, path: str) -> None:
        if path not in self._dirs:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _rename_later(self, path: str, durably: Callable[[], None]) -> None:
        self._unsynced_names.append((_parent(path), durably))


def _clean(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
