"""A consistent copy of a shard's LMDB file: read in chunks here, written and checked there.

LMDB writes no page that an open reader may see, so the pages of a pinned snapshot can be read
from the file while later commits go on; only the two meta pages are rewritten, and those are kept
aside. What arrives is therefore byte for byte a checkpoint (`agentmem_node.storage.checkpoint`):
data file and checkpoint file, which `Environment` opens as it opens its own.

A chunk that the receiver already has (an interrupted copy, or an older copy of the same shard)
is compared by hash and not sent again: most pages of a shard never change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from agentmem_cluster.errors import InternalError
from agentmem_cluster.failpoints import failpoint
from agentmem_node.storage.checkpoint import (
    DATA_NAME,
    Checkpoint,
    make_folder,
    sync_folder,
    write_checkpoint,
)

CHUNK_BYTES: Final = 1 << 20
HASH_BYTES: Final = 16
# A writer syncs after so many bytes: who else syncs to this disk, the journal above all, waits for
# that much and not for a whole shard.
_SYNC_BYTES: Final = 16 << 20


def chunk_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


class StorageSnapshot:
    """The shard as of one applied entry. To be closed: its pages are not reused while it lives.

    `read` may be called in any thread until `close`, and so may `using`, which gives the LMDB
    transaction that sees this moment. The shard may be closed meanwhile, because it moves away:
    closing waits for who is reading, and whoever reads afterwards gets an OSError.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        size_bytes: int,
        unpin: Callable[[], None],
        reader: Any = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._reader = reader
        self.size_bytes = size_bytes
        self._unpin: Callable[[], None] | None = unpin
        # A descriptor that is closed while another thread reads may be another file's by then.
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def is_open(self) -> bool:
        return self._unpin is not None

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES)

    def read(self, number: int) -> bytes:
        """Chunk `number`, from 0; the last is shorter. Raises OSError, ValueError."""
        start = number * CHUNK_BYTES
        if not 0 <= start < self.size_bytes:
            raise ValueError(f"chunk {number} is not within 0..{self.chunks - 1}")
        wanted = min(CHUNK_BYTES, self.size_bytes - start)
        with self.using():
            data = os.pread(self._fd, wanted, start)
        if len(data) != wanted:
            raise OSError(f"chunk {number}: {len(data)} of {wanted} bytes could be read")
        metas = self.checkpoint.metas
        if start < len(metas):
            data = metas[start : start + wanted] + data[len(metas) - start :]
        return data

    @contextmanager
    def using(self) -> Iterator[Any]:
        """The LMDB transaction, for a moment: it holds up who closes. Raises OSError."""
        with self._lock:
            if self._unpin is None:
                raise OSError("the snapshot is closed: its shard has left this node")
            yield self._reader

    def close(self) -> None:
        with self._lock:
            if self._unpin is not None:
                self._unpin()
                self._unpin = None
                os.close(self._fd)


class SnapshotWriter:
    """Receives a snapshot into `folder`, which appears whole and durable, or not at all.

    Chunks may come in any order. What an earlier, interrupted writer left behind is offered by
    `hash_of`, so that the sender can leave out what is there already.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Raises OSError (ENOSPC included, before anything is received)."""
        self.folder = folder
        self.size_bytes = size_bytes
        self._partial = partial_folder(folder)
        self._unsynced_bytes = 0
        make_folder(self._partial)
        self._fd = os.open(self._partial / DATA_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._had_bytes = os.fstat(self._fd).st_size
            os.ftruncate(self._fd, size_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, size_bytes)
        except BaseException:
            self.close()
            raise

    def hash_of(self, number: int) -> bytes | None:
        """Of what stands at that chunk's place; None when there is nothing."""
        standing = self.standing(number)
        return None if standing is None else chunk_hash(standing)

    def standing(self, number: int) -> bytes | None:
        """What an earlier writer left at that chunk's place. Raises OSError.

        It is written again as it is: if that writer's sync failed, the kernel has dropped pages
        that it still shows, and takes them for clean. The sync at the end must cover all of them.
        """
        start = number * CHUNK_BYTES
        if start >= self._had_bytes:
            return None
        data = os.pread(self._fd, min(CHUNK_BYTES, self.size_bytes - start), start)
        self._write_at(start, data)
        return data

    def write(self, number: int, data: bytes) -> None:
        """Raises OSError, ValueError when the chunk has the wrong length."""
        start = number * CHUNK_BYTES
        if len(data) != min(CHUNK_BYTES, self.size_bytes - start):
            raise ValueError(f"chunk {number} has {len(data)} bytes")
        self._write_at(start, data)

    def _write_at(self, start: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, start)
            start += written
            view = view[written:]
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= _SYNC_BYTES:
            self._unsynced_bytes = 0
            self._sync()

    def finish(self, checkpoint: Checkpoint) -> None:
        """Make it durable and give it its name. Blocks for the sync; raises OSError."""
        self._sync()
        self.close()
        write_checkpoint(self._partial, checkpoint)
        if self.folder.exists():
            raise InternalError(f"{self.folder} is there already: a snapshot must not replace it.")
        failpoint("copying.before_rename")
        self._partial.rename(self.folder)
        failpoint("copying.after_rename")
        sync_folder(self.folder.parent)

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._fd)

    def close(self) -> None:
        """Keep what was received for a later attempt."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def discard(folder: Path) -> None:
    """Remove a shard's folder and what is left of an interrupted copy of it. Raises OSError.

    It is renamed first: a removal that a crash cuts short must not leave half a shard behind.
    """
    for path in (partial_folder(folder), folder):
        if path.exists():
            gone = path.with_name(path.name + ".gone")
            if gone.exists():
                shutil.rmtree(gone)
            path.rename(gone)
            shutil.rmtree(gone)


def pinned(path: Path, checkpoint: Checkpoint, size_bytes: int, reader: Any) -> StorageSnapshot:
    """A snapshot whose pages the LMDB transaction `reader` keeps from being reused."""
    try:
        return StorageSnapshot(path, checkpoint, size_bytes, reader.abort, reader)
    except BaseException:
        reader.abort()
        raise
