"""The bytes of a replica on their way to another node: pinned at the source, whole at the target.

Registers travel as one packed value in a few chunks; a real shard as its own snapshots do, page
for page (`agentmem_node.storage.snapshot`).
"""

from __future__ import annotations

from typing import Any, Protocol

from agentmem_chaos.sim.machine import MachineState, MachineStore, ReplicaStore
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_node.storage.checkpoint import Checkpoint
from agentmem_node.storage.snapshot import SnapshotWriter, StorageSnapshot

CHUNKS_MAX = 6


class Snapshot(Protocol):
    """What a source gives. `head`: what else the receiver needs, as plain values."""

    chunks: int
    head: Any

    def read(self, number: int) -> bytes: ...

    def close(self) -> None: ...


class RegisterSnapshot:
    def __init__(self, store: MachineStore) -> None:
        self._data = store.cached.pack()
        self._size = max(1, -(-len(self._data) // CHUNKS_MAX))
        self.chunks = -(-len(self._data) // self._size)
        self.head = None

    def read(self, number: int) -> bytes:
        return self._data[number * self._size : (number + 1) * self._size]

    def close(self) -> None:
        pass


class ShardSnapshot:
    def __init__(self, store: ShardStore) -> None:
        self._snapshot: StorageSnapshot = store.open_snapshot()
        self.chunks = self._snapshot.chunks
        kept = self._snapshot.checkpoint
        self.head = [self._snapshot.size_bytes, kept.metas, kept.state]

    def read(self, number: int) -> bytes:
        return self._snapshot.read(number)

    def close(self) -> None:
        self._snapshot.close()


def open_snapshot(store: ReplicaStore) -> Snapshot:
    if isinstance(store, ShardStore):
        return ShardSnapshot(store)
    assert isinstance(store, MachineStore)
    return RegisterSnapshot(store)


def install(store: ReplicaStore, head: Any, chunks: list[bytes], index: int) -> None:
    """All of it at once, durably: a copy that a crash cuts short is none."""
    if isinstance(store, ShardStore):
        size_bytes, metas, state = head

        def write(writer: SnapshotWriter) -> None:
            for number, data in enumerate(chunks):
                writer.write(number, data)
            writer.finish(Checkpoint(metas, state))

        store.receive(size_bytes, write, index)
        return
    assert isinstance(store, MachineStore)
    store.durable = MachineState.unpack(b"".join(chunks))
    store.cached = store.durable.copy()
