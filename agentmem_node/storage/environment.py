"""One LMDB environment that costs no sync to write and survives kill -9 and power loss.

One write transaction is always open; everything reads and writes through it, on one thread.
Committing it bounds its memory and nothing else: commits are not synced, so they promise nothing.

**Why a checkpoint survives.** LMDB never overwrites a page in place: a commit writes pages that
were free, or lie past the end, and then one of the two meta pages. A page that was freed by
transaction F is handed out again only to a writer that sees no reader at F or before
(`mdb_page_alloc`, `mdb_find_oldest`). So:

1. `begin_checkpoint` commits, giving snapshot R, and at once opens a reader on R, which stays
   open until R's successor is durable. From then on, no page that R uses is written.
2. `CheckpointJob.run` (any thread) syncs the data file: all of R, and parts of what came later.
   Then it replaces the checkpoint file, which holds R's two meta pages, by rename.
3. `checkpoint_done` closes the reader of the checkpoint before.

At every moment the checkpoint file names a snapshot whose pages are all on disk and pinned:
before the rename the old one, after it the new one. `open` always puts the checkpoint's meta
pages back, however the process ended, and lets the journal replay the rest: the pages that
later commits left behind are free pages of that snapshot. It then pins the snapshot before the
first write.

LMDB's own scheme (two meta pages, synced in order) would need two syncs a commit on the event
loop; with syncs left out, it may open a meta page whose pages never arrived.

**Full disk.** Room in the file is allocated before a change begins (`reserve`), so that a commit
does not meet ENOSPC half-way: `reserve` raises DiskFull and nothing has changed. Should a commit
fail all the same (a file system that allocates on overwriting), its transaction is lost and the
environment is of no more use: the process must stop, and the next start is at the checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb

from agentmem_cluster.errors import DiskFull, InternalError
from agentmem_cluster.failpoints import failpoint
from agentmem_node.storage.checkpoint import (
    DATA_NAME,
    Checkpoint,
    damaged,
    make_folder,
    read_checkpoint,
    restore_metas,
    sync_folder,
    write_checkpoint,
)
from agentmem_node.storage.snapshot import StorageSnapshot, pinned

_STATE_KEY: Final = b"state"
# What the state row was when the sums were last in step with the rows: an earlier version of
# AgentMem, which knows of no sums, moves the one and leaves the other.
_SUMMED_KEY: Final = b"summed"
_STATE_DB: Final = "state"
_LOCK_NAME: Final = "lock.mdb"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A page of the file is none that LMDB wrote. The last: what every call answers after one of the
# others, for the transaction is of no more use.
PAGE_ERRORS: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
    lmdb.BadTxnError,
)
# Address space, not disk: pages are allocated as they are used.
MAP_BYTES_DEFAULT: Final = 64 << 30
# The file grows in steps, so that a shard that is filled does not call the file system for
# every batch, and sixteen empty ones do not take a gigabyte.
_GROW_BYTES_MIN: Final = 1 << 20
_GROW_BYTES_MAX: Final = 64 << 20
_GROW_SHARE: Final = 16


class CheckpointJob:
    """Makes one snapshot durable. `run` may be called in any thread.

    It raises DiskFull when there was no room for the checkpoint file, and may then be called
    again. After any other error it is unknown what the disk holds: a replica's process must stop,
    and a copy that nobody counts on yet be made again.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, pin: Any) -> None:
        self.checkpoint = checkpoint
        self.pin = pin
        self._folder = folder

    def run(self) -> None:
        # Its own descriptor: the environment may be closed meanwhile.
        path = self._folder / DATA_NAME
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            failpoint("checkpoint.before_datasync")
            _datasync(fd)
            failpoint("checkpoint.after_datasync")
        except OSError as error:
            # Not even for want of room may this be tried again: the kernel may have dropped the
            # pages that it could not write, and the next sync would then succeed without them.
            raise InternalError(
                f"{path} could not be synced: {error.strerror}.",
                hint="Start the node again; nothing acknowledged is lost.",
            ) from error
        finally:
            os.close(fd)
        try:
            write_checkpoint(self._folder, self.checkpoint)
        except OSError as error:
            # This file is written from its beginning each time.
            if error.errno not in _FULL:
                raise
            raise _disk_full(self._folder, error) from error


class Environment:
    """See the module. Not safe for threads: all calls come from the thread that opened it."""

    def __init__(
        self,
        folder: Path,
        databases: Sequence[str],
        map_bytes: int,
        added_later: Sequence[str] = (),
    ) -> None:
        """`added_later`: those of `databases` that a file of an earlier version lacks.

        Raises StorageDamaged, DiskFull, InternalError when another process has it open.
        """
        self.folder = folder
        # What the state row shall hold whenever a transaction is committed.
        self.state: Callable[[], bytes] = bytes
        self._job: CheckpointJob | None = None
        self._snapshots: list[StorageSnapshot] = []
        self._lock_fd = _lock(folder)
        try:
            checkpoint = read_checkpoint(folder)
            restore_metas(folder, checkpoint)
            # LMDB would believe a table of readers that some tool still holds open, and its
            # last transaction too, which the checkpoint has just undone.
            (folder / _LOCK_NAME).unlink(missing_ok=True)
            self._data_fd = os.open(folder / DATA_NAME, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(self._lock_fd)
            raise
        try:
            self._env = _open(folder, len(databases) + 1, map_bytes)
        except BaseException:
            os.close(self._data_fd)
            os.close(self._lock_fd)
            raise
        self._map_bytes: int = self._env.info()["map_size"]
        self._page_bytes: int = self._env.stat()["psize"]
        # Where the file's used part ends, as of the last commit, and where its blocks do.
        self._end = self._allocated = self._committed_end()
        # Promised to changes of the open transaction.
        self.reserved = 0
        self._pin: Any = self._env.begin()
        self.txn: Any = None
        self.db: dict[str, Any] = {}
        self.durable_state = checkpoint.state
        self.is_touched = False  # rows were changed that the state does not tell of
        self.is_summed = False  # the sums are of these rows
        try:
            fault = self._start(databases, added_later)
        except DiskFull:
            self._close()
            raise
        if fault is not None:
            self._close()
            raise damaged(folder / DATA_NAME, fault)

    def _start(self, databases: Sequence[str], added_later: Sequence[str]) -> str | None:
        """Open the databases and the first transaction. Returns what is wrong with the file."""
        # Before any page is touched: reading a mapped file past its end kills the process.
        if os.fstat(self._data_fd).st_size < self._end:
            return "its end is missing"
        try:
            self._state_db = self._env.open_db(_STATE_DB.encode(), create=False)
            for name in databases:
                if name in added_later and not self._has(name):
                    self._allocate(self._end + _GROW_BYTES_MIN)
                    self.db[name] = self._env.open_db(name.encode(), create=True)
                else:
                    self.db[name] = self._env.open_db(name.encode(), create=False)
            self._end = self._committed_end()
            self.txn = self._env.begin(write=True)
            found = self.txn.get(_STATE_KEY, db=self._state_db)
            self.is_summed = self.txn.get(_SUMMED_KEY, db=self._state_db) == found
        except lmdb.Error as error:
            return str(error)
        if found != self.durable_state:
            return "it is not the snapshot that its checkpoint names"
        return None

    @classmethod
    def create(
        cls, folder: Path, databases: Sequence[str], state: bytes, map_bytes: int
    ) -> Environment:
        """A new environment that holds `state`. After a crash it is there as a whole, or not."""
        new = folder.with_name(folder.name + ".new")
        if new.exists():
            shutil.rmtree(new)
        make_folder(folder.parent)
        new.mkdir()
        env = _open(new, len(databases) + 1, map_bytes)
        try:
            state_db = env.open_db(_STATE_DB.encode())
            for name in databases:
                env.open_db(name.encode())
            with env.begin(write=True) as txn:
                txn.put(_STATE_KEY, state, db=state_db)
                txn.put(_SUMMED_KEY, state, db=state_db)
            page_bytes = env.stat()["psize"]
        finally:
            env.close()
        fd = os.open(new / DATA_NAME, os.O_RDWR | os.O_CLOEXEC)
        try:
            _datasync(fd)
            metas = os.pread(fd, 2 * page_bytes, 0)
        finally:
            os.close(fd)
        write_checkpoint(new, Checkpoint(metas, state))
        failpoint("shard.before_rename")
        new.rename(folder)
        failpoint("shard.after_rename")
        sync_folder(folder.parent)
        return cls(folder, databases, map_bytes)

    # -- writing ------------------------------------------------------------------------

    def reserve(self, size_bytes: int) -> None:
        """Make sure that changes of up to `size_bytes` more can be committed.

        Raises DiskFull, having changed nothing: try again when there is room.
        """
        needed = self._end + self.reserved + size_bytes
        if needed > self._map_bytes:
            raise DiskFull(
                f"The shard in {self.folder} has reached the {self._map_bytes:,} bytes that it "
                "may use.",
                hint="Delete memories, or raise storage.map_bytes and start the node again.",
            )
        if needed > self._allocated:
            step = min(max(needed // _GROW_SHARE, _GROW_BYTES_MIN), _GROW_BYTES_MAX)
            try:
                self._allocate(needed + step)
            except DiskFull:
                # Not ahead, then, but what is needed now.
                self._allocate(needed)
        self.reserved += size_bytes

    def commit(self, reserved: int = 0) -> None:
        """End the transaction and begin the next. Bounds memory; promises nothing. Raises one of
        `PAGE_ERRORS`, after which nothing can be done here, and InternalError.

        `reserved`: how much of what was reserved is for changes still to come.
        """
        self._commit(self.state(), reserved)

    def _commit(self, state: bytes, reserved: int) -> None:
        try:
            failpoint("apply.before_commit")
            self.txn.put(_STATE_KEY, state, db=self._state_db)
            self.txn.put(_SUMMED_KEY, state, db=self._state_db)
            self.txn.commit()
            failpoint("apply.after_commit")
            self.txn = self._env.begin(write=True)
        except PAGE_ERRORS:
            raise
        except lmdb.Error as error:
            raise InternalError(
                f"{self.folder / DATA_NAME} could not be written: {error}.",
                hint="Free some disk space and start the node again; nothing acknowledged is lost.",
            ) from error
        self._end = self._committed_end()
        self.reserved = reserved

    # -- checkpoints --------------------------------------------------------------------

    def begin_checkpoint(self) -> CheckpointJob | None:
        """Commit, pin the snapshot and return the job that makes it durable.

        None while an earlier job is not done, or when nothing has changed since: neither the state
        nor, as `is_touched` says, rows alone.
        """
        state = self.state()
        if self._job is not None or (state == self.durable_state and not self.is_touched):
            return None
        self.is_touched = False
        self._commit(state, 0)
        # No commit may come between this one and the reading of the meta pages: both happen in
        # this call, on the only thread that writes.
        pin = self._env.begin()
        metas = os.pread(self._data_fd, 2 * self._page_bytes, 0)
        self._job = CheckpointJob(self.folder, Checkpoint(metas, state), pin)
        return self._job

    @property
    def is_checkpointing(self) -> bool:
        """A checkpoint was begun and is not known to have succeeded."""
        return self._job is not None

    def checkpoint_done(self, job: CheckpointJob) -> None:
        """To be called after `job.run()` succeeded: from now on its snapshot is the one kept."""
        if job is not self._job:
            raise ValueError("this checkpoint was not begun here, or is done already")
        self._pin.abort()
        self._pin = job.pin
        self._job = None
        self.durable_state = job.checkpoint.state

    def open_snapshot(self) -> StorageSnapshot:
        """Commit, and pin what is visible now for a copy of it. Raises OSError, InternalError.

        While it is open the file cannot reuse what later commits free, so it grows instead.
        """
        self._commit(self.state(), 0)
        # As in `begin_checkpoint`: no commit may come between these.
        reader = self._env.begin()
        metas = os.pread(self._data_fd, 2 * self._page_bytes, 0)
        self._snapshots = [kept for kept in self._snapshots if kept.is_open]
        snapshot = pinned(
            self.folder / DATA_NAME, Checkpoint(metas, self.state()), self._end, reader
        )
        self._snapshots.append(snapshot)
        return snapshot

    def close(self) -> None:
        """Close without a checkpoint: what came after the last one is left to the journal."""
        if self._lock_fd >= 0:
            self._close()

    # -- figures ------------------------------------------------------------------------

    @property
    def file_bytes(self) -> int:
        return self._allocated

    @property
    def used_bytes(self) -> int:
        """Up to the last page in use, as of the last commit."""
        return self._end

    # -- within -------------------------------------------------------------------------

    def _has(self, database: str) -> bool:
        with self._env.begin() as txn:
            return txn.get(database.encode()) is not None

    def _close(self) -> None:
        for snapshot in self._snapshots:
            snapshot.close()
        if self.txn is not None:
            self.txn.abort()
        self._pin.abort()
        if self._job is not None:
            self._job.pin.abort()
        self._env.close()
        os.close(self._data_fd)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _allocate(self, end: int) -> None:
        end = -(-end // self._page_bytes) * self._page_bytes
        try:
            _allocate(self._data_fd, self._allocated, end)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _disk_full(self.folder, error) from error
        self._allocated = end

    def _committed_end(self) -> int:
        end: int = (self._env.info()["last_pgno"] + 1) * self._page_bytes
        return end


def _disk_full(folder: Path, error: OSError) -> DiskFull:
    return DiskFull(
        f"There is no room on the disk of {folder}: {error.strerror}.",
        hint="Free some space; writes resume by themselves.",
    )


def _open(folder: Path, databases: int, map_bytes: int) -> Any:
    try:
        return lmdb.open(
            os.fspath(folder),
            map_size=map_bytes,
            max_dbs=databases,
            # Checkpoints sync; see the module.
            sync=False,
            metasync=False,
            # Reads are of single pages all over the file.
            readahead=False,
            # The table of readers is what keeps the pinned pages.
            lock=True,
            mode=0o600,
        )
    except lmdb.Error as error:
        raise damaged(folder / DATA_NAME, str(error)) from error


def _lock(folder: Path) -> int:
    """Own the folder. Restoring meta pages under a running process would destroy its data."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise damaged(folder, "it is missing") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise InternalError(
            f"The folder {folder} is in use by another process.",
            hint="Stop the other node, or give this one a data folder of its own.",
        ) from error
    return fd


def _allocate(fd: int, start: int, end: int) -> None:
    """Give the file real blocks up to `end`. Raises OSError (ENOSPC)."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        # A file system that cannot promise room; a commit may then fail.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise


def _datasync(fd: int) -> None:
    # macOS has no fdatasync.
    getattr(os, "fdatasync", os.fsync)(fd)
