"""A snapshot of a shard on its way into a store: only the chunks that are not there yet."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from agentmem_cluster.errors import ShuttingDown
from agentmem_node.backup.chunks import Chunks, hash_of
from agentmem_node.backup.content import Content, ContentDigest, rows
from agentmem_node.backup.manifest import ShardBackup
from agentmem_node.backup.objects import ObjectStore
from agentmem_node.backup.pipeline import in_order
from agentmem_node.storage.layout import State
from agentmem_node.storage.snapshot import CHUNK_BYTES, StorageSnapshot

# Rows are added up in the process that serves requests, one thread at a time: after half a
# millisecond of it the thread stands aside for three times as long.
_ROWS_AT_ONCE: Final = 16
_ASIDE: Final = 3


@dataclass(slots=True)
class Progress:
    """How far a transfer is; written by its thread, read by others."""

    total_bytes: int = 0
    done_bytes: int = 0
    moved_bytes: int = 0  # that really went over the wire
    phase: str = ""
    is_cancelled: bool = False

    def check(self) -> None:
        """Raises ShuttingDown when nobody wants the result any more."""
        if self.is_cancelled:
            raise ShuttingDown("The transfer of a backup was called off.")


class RateLimit:
    """At most so many bytes a second, over all that share it. 0: no bound."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def spend(self, size_bytes: int) -> None:
        """Wait until that many bytes may go."""
        if not self._bytes_per_s:
            return
        now_s = time.monotonic()
        with self._lock:
            start_s = max(now_s, self._free_at_s)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
        if start_s > now_s:
            time.sleep(start_s - now_s)


def upload_shard(
    store: ObjectStore,
    snapshot: StorageSnapshot,
    databases: Any,
    *,
    shard: str,
    epoch: int,
    term: int,
    known: frozenset[bytes],
    replace: bool,
    progress: Progress,
    rate: RateLimit,
) -> ShardBackup:
    """Upload what is missing and say what the shard is. Blocks; the snapshot stays open.

    `known` are chunks that another backup names, and that are therefore there; `replace` uploads
    every chunk all the same. Raises what the store raises, and OSError when the file cannot be
    read.
    """
    chunks = Chunks(store)
    hashes: list[bytes] = []
    uploaded_chunks = uploaded_bytes = 0
    progress.phase = "uploading"
    progress.total_bytes = snapshot.size_bytes

    def upload(number: int) -> tuple[bytes, int]:
        progress.check()
        data = snapshot.read(number)
        digest = hash_of(data)
        if digest in known and not replace:
            return digest, 0
        rate.spend(len(data))
        return chunks.put(data, replace=replace)

    for number, (digest, sent) in enumerate(in_order(upload, snapshot.chunks, "backup-chunk"), 1):
        hashes.append(digest)
        uploaded_chunks += sent > 0
        uploaded_bytes += sent
        progress.moved_bytes = uploaded_bytes
        progress.done_bytes = min(snapshot.size_bytes, number * CHUNK_BYTES)
    progress.phase = "adding up"
    content = _content(snapshot, databases, progress)
    state = State.unpack(snapshot.checkpoint.state)
    assert state is not None
    return ShardBackup(
        id=shard,
        epoch=epoch,
        applied_index=state.applied_index,
        term=term,
        digest=state.digest,
        content=content.digest,
        memories=content.memories,
        size_bytes=snapshot.size_bytes,
        metas=snapshot.checkpoint.metas,
        state=snapshot.checkpoint.state,
        chunks=b"".join(hashes),
        uploaded_chunks=uploaded_chunks,
        uploaded_bytes=uploaded_bytes,
    )


def _content(snapshot: StorageSnapshot, databases: Any, progress: Progress) -> Content:
    digest = ContentDigest()
    with snapshot.using() as reader:
        found = rows(reader, databases)
    while True:
        progress.check()
        began_s = time.monotonic()
        with snapshot.using():
            batch = list(islice(found, _ROWS_AT_ONCE))
        if not batch:
            return digest.result()
        for row in batch:
            digest.add(row)
        time.sleep(_ASIDE * (time.monotonic() - began_s))
