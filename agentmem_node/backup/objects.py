"""Where backups are kept: named objects, each there as a whole or not at all.

    /var/backups/agentmem, file:///var/backups/agentmem
    s3://bucket/prefix?endpoint=http://127.0.0.1:5000&region=eu-north-1

Names are `/`-separated, of letters, digits, dots and dashes. All methods block, may be called in
any thread, and raise BackupUnreachable when the place does not answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from agentmem_cluster.errors import DiskFull
from agentmem_node.backup.errors import BackupDestination, BackupMissing, BackupUnreachable
from agentmem_node.storage.checkpoint import make_folder, sync_folder

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# What a writer leaves behind that was killed. Begins with a dot: no object's name does.
_UNFINISHED: Final = ".unfinished-"
_FULL: Final = ("ENOSPC", "EDQUOT")


class ObjectInfo(NamedTuple):
    name: str
    size_bytes: int
    modified_ms: int


class ObjectStore(Protocol):
    """A place for objects. `url` names it for people, and never holds a secret."""

    @property
    def url(self) -> str: ...

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it. Readers see the old one or the new one."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """False, and nothing changed, when there is an object of this name."""
        ...

    def get(self, name: str) -> bytes:
        """Raises BackupMissing."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose name begins with `prefix`, in the order of names, after `after`."""
        ...

    def delete(self, name: str) -> None:
        """Nothing happens when there is none."""
        ...

    def sweep(self, before_ms: int) -> None:
        """Remove what writers that were killed before that time have left unfinished."""
        ...


class DirectoryStore:
    """Objects as files. Two processes, also on two machines that share it, may write at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def url(self) -> str:
        return str(self._folder)

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        unfinished = self._write(path, data)
        try:
            unfinished.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise self._failed("written", path, error) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        if path.exists():
            return False
        unfinished = self._write(path, data)
        try:
            # Unlike a rename, a link never replaces what another writer was first with.
            os.link(unfinished, path)
            sync_folder(path.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._failed("written", path, error) from error
        finally:
            with suppress(OSError):
                unfinished.unlink()
        return True

    def get(self, name: str) -> bytes:
        path = self._path(name)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise missing(name, self.url) from None
        except OSError as error:
            raise self._failed("read", path, error) from error

    def exists(self, name: str) -> bool:
        try:
            return self._path(name).is_file()
        except OSError as error:
            raise self._failed("read", self._path(name), error) from error

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        try:
            if not self._folder.is_dir():
                return
            # The deepest folder that holds all of them: the rest of the tree is not looked at.
            start = self._folder / prefix.rpartition("/")[0]
            yield from self._walk(start, prefix, after)
        except OSError as error:
            raise self._failed("listed", self._folder, error) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed("deleted", path, error) from error

    def sweep(self, before_ms: int) -> None:
        try:
            for path in self._folder.rglob(f"{_UNFINISHED}*"):
                if path.stat().st_mtime_ns // 1_000_000 < before_ms:
                    path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # its writer lives, and has just finished it
        except OSError as error:
            raise self._failed("swept", self._folder, error) from error

    # -- within ---------------------------------------------------------------------------

    def _walk(self, folder: Path, prefix: str, after: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        # As the names sort: a folder's name counts with the slash that follows it.
        entries.sort(key=lambda entry: entry.name + ("/" if entry.is_dir() else ""))
        for entry in entries:
            name = Path(entry.path).relative_to(self._folder).as_posix()
            if entry.is_dir():
                inside = name + "/"
                wanted = inside.startswith(prefix) or prefix.startswith(inside)
                if wanted and not (inside < after and not after.startswith(inside)):
                    yield from self._walk(Path(entry.path), prefix, after)
            elif name.startswith(prefix) and name > after and not entry.name.startswith("."):
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue  # removed meanwhile
                yield ObjectInfo(name, found.st_size, found.st_mtime_ns // 1_000_000)

    def _write(self, path: Path, data: bytes) -> Path:
        unfinished = path.parent / f"{_UNFINISHED}{os.urandom(8).hex()}"
        try:
            make_folder(path.parent)
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise self._failed("written", path, error) from error
        return unfinished

    def _path(self, name: str) -> Path:
        return self._folder / checked(name)

    def _failed(self, what: str, path: Path, error: OSError) -> BackupUnreachable | DiskFull:
        if errno_name(error) in _FULL:
            return DiskFull(
                f"There is no room for the backup's file {path}: {error.strerror}.",
                hint="Free some space, or `agentmem backup prune` old backups, and run it again.",
            )
        return BackupUnreachable(
            f"The backup's file {path} could not be {what}: {error.strerror or error}.",
            hint="Every node must be able to write to this directory: use one that all nodes "
            "share, or a bucket.",
        )


def open_store(url: str) -> ObjectStore:
    """The store at a URL. Raises BackupDestination when it is none."""
    split = urlsplit(url)
    if split.scheme == "s3":
        from agentmem_node.backup.s3 import open_s3

        return open_s3(url, split)
    if split.scheme == "file":
        return DirectoryStore(_absolute(url, _file_path(url, split)))
    if split.scheme and "://" in url:
        raise _not_a_place(url, f"{split.scheme}:// is not supported")
    return DirectoryStore(_absolute(url, url))


def _file_path(url: str, split: SplitResult) -> str:
    if split.netloc not in ("", "localhost"):
        raise _not_a_place(url, f"it names the machine {split.netloc!r}")
    return unquote(split.path)


def _absolute(url: str, path: str) -> Path:
    if not path.startswith("/") or "\0" in path:
        # Each node writes by itself, and would take a relative path from where it was started.
        raise _not_a_place(url, "the path is not absolute")
    return Path(path)


def parameters(url: str, split: SplitResult, known: frozenset[str]) -> dict[str, str]:
    """The query of a URL. Raises BackupDestination on names that are not `known`."""
    given = parse_qsl(split.query, keep_blank_values=True)
    for name, _ in given:
        if name not in known:
            raise _not_a_place(url, f"{name!r} is none of {', '.join(sorted(known))}")
    return dict(given)


def _not_a_place(url: str, why: str) -> BackupDestination:
    shown = url.partition("?")[0][:200]
    return BackupDestination(
        f"Backups cannot be kept at {shown!r}: {why}.",
        hint="Give an absolute path (/var/backups/agentmem), file:///path, or "
        "s3://bucket/prefix?endpoint=URL&region=NAME.",
    )


def missing(name: str, url: str) -> BackupMissing:
    return BackupMissing(
        f"There is no object {name} in {url}.",
        hint="`agentmem backup list` shows what backups are there.",
        object=name,
    )


def checked(name: str) -> str:
    """`name`. Raises ValueError for what could lead out of the store."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an object")
    return name


def errno_name(error: OSError) -> str:
    import errno

    return errno.errorcode.get(error.errno or 0, "")
