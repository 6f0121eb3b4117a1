"""The real shard as a simulated group's state machine: memories in LMDB, applied by the engine.

A client's command becomes the command that the service would propose: a create adds a memory, a
cas updates the version that was read, a delete may name one. The bytes differ from attempt to
attempt, because each node decides with its own clock; the request id is what stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import msgpack
import msgspec

from agentmem_chaos.checker import GONE, Kind
from agentmem_chaos.sim.machine import Command, Effect, Observer, Outcome
from agentmem_chaos.sim.places import TENANT
from agentmem_chaos.sim.shard_store import DIM, ShardStore
from agentmem_cluster.epochs.commands import EpochState, Sealed, is_control
from agentmem_cluster.errors import DiskFull
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.ring import slot_of_id
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import (
    REQUEST_ID_BYTES,
    Add,
    Delete,
    EpochChanged,
    Op,
    Rejected,
    Update,
    Write,
    WriteResult,
    decode,
    encode_write,
)
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.records import decode_memory
from agentmem_node.model.times import format_ms

# All that is stored is compared at these indexes. Batches end there, so that every replica stops.
COMPARED_EVERY = 100
ONE_BY_ONE_CHANCE = 0.7


class ShardMachine:
    """Implements `machine.Replica` over a `ShardStore`."""

    def __init__(self, store: ShardStore, observe: Observer) -> None:
        self._store = store
        self._observe = observe
        self._shard: Shard = store.open()
        self._is_trimmed = False

    @property
    def applied_index(self) -> int:
        return self._shard.applied_index

    @property
    def durable_index(self) -> int:
        return self._shard.durable_index

    @property
    def epoch_state(self) -> EpochState:
        return self._shard.epoch_state

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        if self._store.is_full():
            raise DiskFull("the state machine has no room")
        effects: list[Any] = []
        for part in self._parts(entries):
            results = self._shard.apply(part)
            self._store.applied()
            for entry, result in zip(part, results, strict=True):
                effect = effect_of(entry.command, result)
                effects.append(result if isinstance(result, Sealed) else effect)
                self._observe(entry, effect, self._compared(entry) if entry is part[-1] else None)
        return effects

    def _parts(self, entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
        """One by one, so that digests meet; or in batches, as a replay does it."""
        if self._store.chance.random() < ONE_BY_ONE_CHANCE:
            for entry in entries:
                yield [entry]
            return
        part: list[Entry] = []
        for entry in entries:
            part.append(entry)
            if entry.index % COMPARED_EVERY == 0 or is_control(entry.command):
                yield part
                part = []
        if part:
            yield part

    def _compared(self, entry: Entry) -> bytes | None:
        digest = self._shard.digest()
        whole = entry.index % COMPARED_EVERY == 0 or is_control(entry.command)
        if whole and self._is_trimmed:
            return None  # its rows are a part's, its digest the whole's
        return digest + self.contents() if whole else digest

    def trim(self, slots: tuple[int, int]) -> None:
        for _ in self._shard.trim(*slots):
            self._store.applied()
        self._is_trimmed = True

    def restrict(self, slots: tuple[int, int]) -> None:
        for _ in self._shard.restrict(*slots):
            self._store.applied()
        self._is_trimmed = False

    def rebase(self, index: int, ended: int) -> None:
        self._shard.rebase(index, ended)

    def strays(self, slots: tuple[int, int]) -> int:
        return sum(not slots[0] <= slot_of_id(one) < slots[1] for one in self._store.ids())

    def encode(self, command: Command, at_ms: int) -> bytes:
        key = self._id_of(command.key)
        op: Op
        if command.kind == Kind.DELETE.value:
            op = Delete(key, None if command.expected is None else command.expected[0])
        else:
            version, content = command.value
            record = _record(key, command, version, content, at_ms)
            vector = hashlib.blake2b(b"%d" % content, digest_size=4 * DIM).digest()
            if command.expected is None:
                op = Add(key, record, vector, at_ms, None)
            else:
                op = Update(key, command.expected[0], record, vector, None)
        fingerprint = hashlib.blake2b(repr(command[1:5]).encode(), digest_size=8).digest()
        return encode_write(Write(_request_id(command.request), fingerprint, TENANT, at_ms, (op,)))

    def read(self, key: str) -> Hashable:
        """(version, content), None where nothing was ever, `GONE` after a delete."""
        memory_id = self._id_of(key)
        stored = self._shard.get(TENANT, memory_id)
        if stored is None:
            return GONE if self._shard.history(TENANT, memory_id, limit=1) else None
        memory = decode_memory(stored.record)
        if memory is None or memory.version != stored.version:
            return ("damaged", stored.version)
        return (stored.version, int(memory.content.split()[0]))

    def _id_of(self, key: str) -> bytes:
        return id_of(key, self._store.slot_of(key))

    def outcome(self, request: str) -> Outcome | None:
        kept = self._shard.ledger_lookup(TENANT, _request_id(request))
        return None if kept is None else (kept.outcomes[0].status == "ok", kept.outcomes[0].version)

    def contents(self) -> bytes:
        return self._store.contents()

    def checkpoint(self) -> Any:
        job = self._shard.checkpoint()
        return None if job is None else self._store.checkpointing(job, self.applied_index)

    def checkpoint_done(self, job: Any) -> None:
        self._store.checkpointed(job)
        self._shard.checkpoint_done(job.job)

    def digest(self) -> bytes:
        return self._shard.digest()

    def close(self) -> None:
        self._store.close()


class RefusedByShard(Exception):
    """A command that was made here is none to the shard, or another's under the same id."""


def effect_of(command: bytes, result: Any) -> Effect:
    if not command or isinstance(result, EpochChanged | Sealed):
        return Effect(not isinstance(result, Sealed), None, False)
    if not isinstance(result, WriteResult):
        raise RefusedByShard(f"{describe(command)}: {result!r}")
    if not result.outcomes:  # answered again, of a memory that a trimmed copy is rid of
        return Effect(False, None, not result.replayed, request_of(command))
    outcome = result.outcomes[0]
    return Effect(outcome.status == "ok", outcome.version, not result.replayed, request_of(command))


def id_of(key: str, slot: int) -> bytes:
    """A memory id of that slot (`agentmem_cluster.ring.slot_of_id`)."""
    made = bytearray(hashlib.blake2b(key.encode(), digest_size=16).digest())
    made[6] = made[6] & 0xF0 | slot >> 10
    made[7] = slot >> 2 & 0xFF
    made[8] = made[8] & 0xCF | (slot & 0b11) << 4
    return bytes(made)


def _request_id(request: str) -> bytes:
    return request.encode().ljust(REQUEST_ID_BYTES, b"\0")


def request_of(command: bytes) -> str:
    """The request's own name, which its 16 bytes hold."""
    request_id: bytes = msgpack.unpackb(command)[2]
    return request_id.rstrip(b"\0").decode()


def describe(command: bytes) -> str:
    write = decode(command)
    if isinstance(write, Rejected):
        return f"{len(command)} bytes that are no command ({write.reason})"
    if not isinstance(write, Write):
        return str(write)  # the seal of an epoch, or the beginning of the next
    ops = ", ".join(f"{type(op).__name__} {op.id.hex()[:8]}" for op in write.ops)
    return f"{request_of(command)} ({ops})"


def _record(key: bytes, command: Command, version: int, content: int, at_ms: int) -> bytes:
    memory = Memory(
        id=format_id(key),
        content=f"{content} {'x' * len(command.padding)}",
        user_id=command.key.partition(".")[0],  # the owner: shared by the lives of one key
        created_at=format_ms(at_ms),
        updated_at=format_ms(at_ms),
        version=version,
    )
    return msgspec.json.encode(memory)
