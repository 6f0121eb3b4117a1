"""A shard's real files, and what is left of them when its process or its machine dies.

A kill leaves the files as they are: the page cache is the kernel's. A power cut leaves of each
sector of the data file anything that was in it since the last sync, and the checkpoint file of
before or after the job that was under way (`storage/environment.py` says why that must do).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem_node.engine.shard import Shard
from agentmem_node.storage.checkpoint import DATA_NAME
from agentmem_node.storage.environment import CheckpointJob
from agentmem_node.storage.layout import U32
from agentmem_node.storage.snapshot import SnapshotWriter, StorageSnapshot, discard
from agentmem_node.storage.store import Store

DIM = 4
MAP_BYTES = 256 << 20
SECTOR_BYTES = 512
PAGE_BYTES = 4096
# Contents of the data file since its last sync that are remembered, beside the synced one and
# the present one; and how often one is taken.
IMAGES_BETWEEN_MAX = 2
IMAGE_CHANCE = 0.03


class SimCheckpoint:
    """The shard's own job, and what it will have made durable."""

    def __init__(self, store: ShardStore, job: CheckpointJob, index: int) -> None:
        self._store = store
        self.job = job
        self.index = index
        self.has_run = False

    def run(self) -> None:
        self._store.synced(self)
        self.job.run()
        self.has_run = True


class ShardStore:
    """Implements `machine.ReplicaStore` over a folder of this machine."""

    def __init__(
        self,
        folder: Path,
        shard_id: str,
        chance: random.Random,
        is_full: Callable[[], bool] = lambda: False,
        slot_of: Callable[[str], int] = lambda key: 0,
    ) -> None:
        """`slot_of`: of a client's key."""
        self.chance = chance
        self.is_full = is_full
        self.slot_of = slot_of
        self._folder = folder
        self._id = shard_id
        self._store: Store | None = None
        self._shard: Shard | None = None
        self._job: SimCheckpoint | None = None
        self._durable_index = 0
        self._images: list[bytes] = []  # of the data file: as last synced, then what came after
        self._synced_size = 0
        self._snapshots: list[StorageSnapshot] = []

    @property
    def durable_index(self) -> int:
        return self._durable_index

    def open(self) -> Shard:
        """The shard as a starting process finds it."""
        self._let_go()
        is_new = not self._folder.exists()
        store = self._store = Store.open(self._folder, dim=DIM, map_bytes=MAP_BYTES)
        if is_new:
            self._is_synced()
        self._shard = Shard(store, self._id, index_factory=None)
        return self._shard

    def open_snapshot(self) -> StorageSnapshot:
        """What is visible now, to be copied to another node."""
        assert self._shard is not None
        snapshot = self._shard.open_snapshot()
        self._snapshots.append(snapshot)
        return snapshot

    @property
    def databases(self) -> Any:
        assert self._store is not None
        return self._store.env.db

    def receive(self, size_bytes: int, write: Callable[[SnapshotWriter], None], index: int) -> None:
        """A snapshot of entry `index` from another node takes this place, durably."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        writer = SnapshotWriter(self._folder, size_bytes)
        try:
            write(writer)
        finally:
            writer.close()
        self._is_synced()
        self._durable_index = index

    def remove(self) -> None:
        self.close()
        discard(self._folder)

    def ids(self) -> list[bytes]:
        """Of all memories, deleted ones too."""
        assert self._store is not None
        env = self._store.env
        return [bytes(key[U32.size :]) for key, _ in env.txn.cursor(db=env.db["ids"])]

    def contents(self) -> bytes:
        """A hash of every row."""
        assert self._store is not None
        env = self._store.env
        rows = hashlib.blake2b(self._store.state.pack(), digest_size=16)
        for name in sorted(env.db):
            rows.update(name.encode())
            for key, value in env.txn.cursor(db=env.db[name]):
                rows.update(b"%d %d " % (len(key), len(value)) + key + value)
        return rows.digest()

    # -- what the process does --

    def applied(self) -> None:
        if self.chance.random() < IMAGE_CHANCE:
            if len(self._images) > IMAGES_BETWEEN_MAX:
                del self._images[self.chance.randrange(1, len(self._images))]
            self._images.append(self._image())

    def checkpointing(self, job: CheckpointJob, index: int) -> SimCheckpoint:
        self._job = SimCheckpoint(self, job, index)
        return self._job

    def synced(self, job: SimCheckpoint) -> None:
        """The job syncs the data file; then it replaces the checkpoint file, durably."""
        self._is_synced()
        self._durable_index = job.index

    def checkpointed(self, job: SimCheckpoint) -> None:
        if job is self._job:
            self._job = None

    # -- how it ends --

    def kill(self, *, keeps_cached: bool) -> None:
        """The files stay as they are; opening goes back to the checkpoint in any case."""
        if self._job is not None and not self._job.has_run and self.chance.random() < 0.3:
            self._job.run()  # the job's thread was just done when the process died
        self._let_go()

    def power_loss(self) -> None:
        chance = self.chance
        if self._job is not None and not self._job.has_run:
            stage = chance.random()
            if stage < 0.25:
                self._is_synced()  # and the checkpoint file is not replaced
            elif stage < 0.5:
                self._job.run()
        self._let_go()
        if not self._folder.exists():
            return
        self._images.append(self._image())
        data = mixture(self._images, chance)
        path = self._folder / DATA_NAME
        sizes = [max(self._synced_size, len(data)), path.stat().st_size]
        with path.open("r+b") as file:
            file.write(data)
            file.truncate(chance.choice(sizes))
        self._is_synced()

    def close(self) -> None:
        self._let_go()
        self._images.clear()

    def _let_go(self) -> None:
        """No checkpoint is made: what came after the last one is left to the journal."""
        self._job = self._shard = None
        for snapshot in self._snapshots:
            snapshot.close()
        self._snapshots.clear()
        if self._store is not None:
            self._store.env.close()
            self._store = None

    def _is_synced(self) -> None:
        self._images = [self._image()]
        self._synced_size = (self._folder / DATA_NAME).stat().st_size

    def _image(self) -> bytes:
        used = -1 if self._store is None else self._store.env.used_bytes
        with (self._folder / DATA_NAME).open("rb") as file:
            data = file.read(used)
        return data if used >= 0 else data.rstrip(b"\0")


def mixture(images: list[bytes], chance: random.Random) -> bytes:
    """Of each sector, any of the images' contents. The first image was synced: it is all there."""
    size = max(map(len, images))
    if chance.random() < 0.3:
        # All or nothing of what came after: the two ends that chance seldom meets.
        return chance.choice(images).ljust(size, b"\0")
    mixed = bytearray(images[0].ljust(size, b"\0"))
    for page in range(0, size, PAGE_BYTES):
        if len({image[page : page + PAGE_BYTES].rstrip(b"\0") for image in images}) == 1:
            continue
        for start in range(page, min(page + PAGE_BYTES, size), SECTOR_BYTES):
            stop = min(start + SECTOR_BYTES, size)
            mixed[start:stop] = chance.choice(images)[start:stop].ljust(stop - start, b"\0")
    return bytes(mixed)
