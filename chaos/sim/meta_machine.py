"""The real state machine of the meta group, as a simulated replica: on the simulated disk."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import msgpack

from agentmem_chaos.sim.machine import Command, Effect, Observer, Outcome
from agentmem_cluster.epochs.commands import EpochState
from agentmem_cluster.meta import MetaStateMachine
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.runtime import Disk


class MetaStore:
    """Implements `machine.ReplicaStore`: the disk itself says what a crash keeps."""

    def __init__(self) -> None:
        self.durable_index = 0

    def kill(self, *, keeps_cached: bool) -> None:
        pass

    def power_loss(self) -> None:
        pass

    def close(self) -> None:
        pass

    def remove(self) -> None:
        pass


class MetaReplica:
    """Implements `machine.Replica`."""

    def __init__(self, disk: Disk, path: str, store: MetaStore, observe: Observer) -> None:
        self.inner = MetaStateMachine(disk, path)
        self._store = store
        self._observe = observe
        store.durable_index = self.inner.durable_index

    @property
    def applied_index(self) -> int:
        return self.inner.applied_index

    @property
    def durable_index(self) -> int:
        return self.inner.durable_index

    @property
    def epoch_state(self) -> EpochState:
        return self.inner.epoch_state

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        results: list[Any] = []
        for entry in entries:
            (outcome,) = self.inner.apply([entry])
            results.append(outcome)
            self._observe(entry, Effect(outcome.ok, None, False), self.inner.digest())
        return results

    def checkpoint(self) -> Any:
        return self.inner.checkpoint()

    def checkpoint_done(self, job: Any) -> None:
        self.inner.checkpoint_done(job)
        self._store.durable_index = self.inner.durable_index

    def digest(self) -> bytes:
        return self.inner.digest()

    def close(self) -> None:
        self.inner.close()

    def encode(self, command: Command, at_ms: int) -> bytes:
        raise NotImplementedError("clients have no business with the meta group")

    def read(self, key: str) -> Hashable:
        return None

    def outcome(self, request: str) -> Outcome | None:
        return None

    def contents(self) -> bytes:
        packed: bytes = msgpack.packb(self.inner.state.to_wire())
        return hashlib.blake2b(packed, digest_size=16).digest()
