"""The data directory: one node's, for ever, and one process's at a time.

LOCK                    held by the running process
node.json               whose directory this is, and in which format
journal/  meta/         the write-ahead journal; the meta group's checkpoint
shards/s00-e1/          one LMDB environment a shard and epoch
text/                   the full-text index: derived, rebuilt when missing
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

import msgspec

# The highest that this version knows. A new directory is of the first, which the version before
# reads as well; `DataDir.require` raises it when there is no way back to that version.
FORMAT = 2
_FORMAT_FIRST = 1


class DataDirError(Exception):
    """The directory cannot be used; the message says why and what to do."""


class _Identity(msgspec.Struct):
    node: str
    cluster: str
    format: int = _FORMAT_FIRST


class DataDir:
    """Open and locked for as long as the object lives."""

    def __init__(self, path: Path, lock_fd: int, identity: _Identity) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._identity = identity

    @classmethod
    def open(cls, path: Path, node_id: str, cluster: str) -> DataDir:
        """Make, lock and check the directory. Raises DataDirError."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = "it is a file" if path.is_file() else error.strerror
            raise DataDirError(
                f"Cannot use the data directory {path}: {why}. Choose another with "
                "--data, or give this user the right to write there."
            ) from error
        try:
            # The kernel drops the lock when the process dies, however it dies.
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(lock_fd, 32, 0).decode(errors="replace").strip()
            os.close(lock_fd)
            raise DataDirError(
                f"The data directory {path} is in use by another process"
                f"{f' (pid {owner})' if owner else ''}. Stop it first, or choose another "
                "directory with --data."
            ) from error
        try:
            identity = _check_identity(path, node_id, cluster)
        except BaseException:
            os.close(lock_fd)
            raise
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, lock_fd, identity)

    def require(self, form: int) -> None:
        """From now on, durably, a version that knows lower formats only refuses this directory.

        Raises OSError.
        """
        if form > self._identity.format:
            raised = _Identity(self._identity.node, self._identity.cluster, form)
            _write_identity(self.path, raised)
            self._identity = raised

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_identity(path: Path, node_id: str, cluster: str) -> _Identity:
    file = path / "node.json"
    own = _Identity(node=node_id, cluster=cluster)
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_Identity)
    except FileNotFoundError:
        if (path / "journal").exists():
            raise DataDirError(
                f"{path} holds a journal but no node.json: it is not certain whose data this is. "
                "Restore node.json from a backup, or choose another directory with --data."
            ) from None
        _write_identity(path, own)
        return own
    except (OSError, msgspec.DecodeError) as error:
        raise DataDirError(f"{file} cannot be read: {error}.") from error
    if found.format > FORMAT:
        raise DataDirError(
            f"{path} was written by a newer version (format {found.format}; this one knows "
            f"{FORMAT}). Install that version again."
        )
    if (found.node, found.cluster) != (node_id, cluster):
        raise DataDirError(
            f"{path} belongs to node {found.node!r} of cluster {found.cluster!r}; this is node "
            f"{node_id!r} of cluster {cluster!r}. A node that took over another's votes could "
            "lose acknowledged writes: choose another directory with --data."
        )
    return found


def _write_identity(path: Path, identity: _Identity) -> None:
    new = path / "node.json.new"
    with new.open("wb") as out:
        out.write(msgspec.json.encode(identity))
        out.flush()
        os.fsync(out.fileno())
    new.rename(path / "node.json")
    # Without this a power loss could leave a journal that belongs to nobody.
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
