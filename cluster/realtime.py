"""The real machine behind `agentmem_cluster.runtime`: the only file that asks the system for
time, chance and disk."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import time
from pathlib import Path
from typing import NoReturn

# Apple's fsync leaves data in the drive's cache; this request does not.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

# What a file system without preallocation answers (NFS, some overlays, tmpfs of old kernels).
_NO_PREALLOCATION = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class RealClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class RealRng:
    def __init__(self) -> None:
        self._random = random.Random(os.urandom(32))

    def random(self) -> float:
        return self._random.random()

    def token(self, size_bytes: int) -> bytes:
        return os.urandom(size_bytes)


class RealFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size_bytes: int, offset: int) -> bytes:
        data = os.pread(self._fd, size_bytes, offset)
        if len(data) == size_bytes or not data:
            return data
        # Linux returns at most 2 GiB a call, and a signal may cut one short.
        parts = [data]
        read = len(data)
        while read < size_bytes:
            more = os.pread(self._fd, size_bytes - read, offset + read)
            if not more:
                break
            parts.append(more)
            read += len(more)
        return b"".join(parts)

    def pwrite(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        if written == len(data):
            return
        rest = memoryview(data)[written:]
        while rest:
            offset += written
            written = os.pwrite(self._fd, rest, offset)
            rest = rest[written:]

    def datasync(self) -> None:
        if _FULL_SYNC is not None:
            fcntl.fcntl(self._fd, _FULL_SYNC)
        else:
            os.fdatasync(self._fd)

    def allocate(self, size_bytes: int) -> None:
        if size_bytes <= self.size():
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, size_bytes)
                return
            except OSError as refused:
                if refused.errno not in _NO_PREALLOCATION:
                    raise
        os.ftruncate(self._fd, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RealDisk:
    """A directory of the machine. It and its files are readable by their owner only."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self, path: str, *, create: bool = False) -> RealFile:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return RealFile(os.open(self._at(path), flags, 0o600))

    def list(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._at(path)))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return self._at(path).exists()

    def make_dir(self, path: str) -> None:
        self._at(path).mkdir(mode=0o700, parents=True, exist_ok=True)

    def rename(self, old: str, new: str) -> None:
        self._at(old).replace(self._at(new))

    def remove(self, path: str) -> None:
        self._at(path).unlink()

    def sync_dir(self, path: str) -> None:
        fd = os.open(self._at(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        stat = os.statvfs(self.root)
        return stat.f_bavail * stat.f_frsize

    def _at(self, path: str) -> Path:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{path!r} is not a path within the disk")
        return self.root / path


class RealFaults:
    """What `agentmem_cluster.failpoints` does to this process."""

    def crash(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)  # not reached: the kernel ends the caller first

    def stall(self, seconds: float) -> None:
        time.sleep(seconds)
