"""A small state machine for simulated groups: registers, counters and a request ledger.

Of the same shape as a shard (`shard_machine` runs the real one): a command carries its request
id, the ledger makes it take effect once whatever is retried, a rolling digest covers commands
*and* results, and the state becomes durable only at checkpoints (LMDB without a sync per
transaction: what was applied survives the process, only what was synced survives the machine).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgpack

from agentmem_cluster.epochs.commands import EpochState, Sealed, decode
from agentmem_cluster.errors import DiskFull
from agentmem_cluster.raft.api import Entry
from agentmem_node.storage.restrict import digest_of_part


class Command(NamedTuple):
    """What a client asks for. Each machine has its own bytes for it (`Replica.encode`)."""

    request: str
    kind: str  # of `checker.Kind`
    key: str
    value: Any  # an int; of a memory: (version, content)
    expected: Any = None
    padding: bytes = b""

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb(list(self))
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Command:
        return cls(*msgpack.unpackb(data))


class Effect(NamedTuple):
    """What a command did. `fresh` is False when the ledger answered instead."""

    ok: bool
    value: int | None  # of a memory: its version
    fresh: bool
    request: str = ""


# What a ledger keeps of a request.
Outcome = tuple[bool, int | None]
# Called for each entry with what it did and the digest after it, where there is one.
Observer = Callable[[Entry, Effect, bytes | None], None]


class Replica(Protocol):
    """A state machine as the simulator sees it: `raft.api.StateMachine`, and what is checked."""

    @property
    def applied_index(self) -> int: ...

    @property
    def durable_index(self) -> int: ...

    @property
    def epoch_state(self) -> EpochState: ...

    def apply(self, entries: Sequence[Entry]) -> list[Any]: ...

    def checkpoint(self) -> Any: ...

    def checkpoint_done(self, job: Any) -> None: ...

    def digest(self) -> bytes: ...

    def close(self) -> None: ...

    def encode(self, command: Command, at_ms: int) -> bytes:
        """The bytes of a command that a node decides on when its clock shows `at_ms`."""
        ...

    def read(self, key: str) -> Hashable: ...

    def outcome(self, request: str) -> Outcome | None:
        """What the ledger keeps of a request."""
        ...

    def contents(self) -> bytes:
        """A hash of all that is stored, the digest of the log apart: equal on equal replicas."""
        ...


class Divisible(Replica, Protocol):
    """What can be split: all but the meta group."""

    def trim(self, slots: tuple[int, int]) -> None:
        """Of a copy that is to be a part: be rid of what it can be rid of already."""
        ...

    def restrict(self, slots: tuple[int, int]) -> None:
        """Be the part with slots [first, end) from here on."""
        ...

    def rebase(self, index: int, ended: int) -> None:
        """Take the place of the final state of epoch `ended`, whose log ended at `index`."""
        ...

    def strays(self, slots: tuple[int, int]) -> int:
        """How much is stored here with other slots."""
        ...


class ReplicaStore(Protocol):
    """Where a replica's state lives between two processes: page cache and platter."""

    @property
    def durable_index(self) -> int:
        """The last entry that a power loss now would leave."""
        ...

    def kill(self, *, keeps_cached: bool) -> None: ...

    def power_loss(self) -> None: ...

    def close(self) -> None:
        """The world ends: let go of what the operating system lent."""
        ...

    def remove(self) -> None:
        """The replica is of no more use: its files go."""
        ...


@dataclass(slots=True)
class MachineState:
    applied_index: int = 0
    digest: bytes = bytes(16)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)  # value, index of change
    ledger: dict[str, tuple[bool, int | None]] = field(default_factory=dict)
    epoch: EpochState = field(default_factory=EpochState)

    def copy(self) -> MachineState:
        return MachineState(
            self.applied_index, self.digest, dict(self.registers), dict(self.ledger), self.epoch
        )

    def pack(self) -> bytes:
        """As it travels to another node."""
        rows = [self.applied_index, self.digest, self.registers, self.ledger, self.epoch]
        packed: bytes = msgpack.packb(rows)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> MachineState:
        index, digest, registers, ledger, epoch = msgpack.unpackb(data)
        return cls(
            index,
            digest,
            {key: tuple(value) for key, value in registers.items()},
            {key: tuple(value) for key, value in ledger.items()},
            EpochState(*epoch),
        )


@dataclass(slots=True)
class MachineStore:
    """Implements `ReplicaStore` in memory."""

    cached: MachineState = field(default_factory=MachineState)
    durable: MachineState = field(default_factory=MachineState)
    is_full: Callable[[], bool] = lambda: False
    slot_of: Callable[[str], int] = lambda key: 0

    @property
    def durable_index(self) -> int:
        return self.durable.applied_index

    def power_loss(self) -> None:
        self.cached = self.durable.copy()

    def kill(self, *, keeps_cached: bool) -> None:
        if not keeps_cached:
            self.cached = self.durable.copy()

    def close(self) -> None:
        pass

    def remove(self) -> None:
        self.cached, self.durable = MachineState(), MachineState()


class CheckpointJob:
    def __init__(self, store: MachineStore, state: MachineState) -> None:
        self._store = store
        self._state = state
        self.index = state.applied_index
        self.digest = state.digest

    def run(self) -> None:
        # A copy of its own: a power loss hands `durable` to the next process, which changes it.
        self._store.durable = self._state.copy()


class RegisterMachine:
    """Implements `Replica` over a `MachineStore`."""

    keeps_ledger = True

    def __init__(self, store: MachineStore, observe: Observer) -> None:
        self._store = store
        self._observe = observe
        self._durable = (store.durable.applied_index, store.durable.digest)

    @property
    def applied_index(self) -> int:
        return self._store.cached.applied_index

    @property
    def durable_index(self) -> int:
        return self._durable[0]

    @property
    def epoch_state(self) -> EpochState:
        return self._store.cached.epoch

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        if self._store.is_full():
            # As a shard does: nothing was applied, and the same entries may be tried again.
            raise DiskFull("the state machine has no room")
        state = self._store.cached
        results: list[Any] = []
        for entry in entries:
            control = decode(entry.command)
            is_outside = control is None and state.epoch.is_sealed and bool(entry.command)
            if control is not None or is_outside:
                effect = Effect(not is_outside, None, False)
            else:
                effect = self._apply_one(state, entry)
            if control is not None:
                state.epoch = state.epoch.after(control)
            state.applied_index = entry.index
            state.digest = hashlib.blake2b(
                b"%d %d %r" % (entry.index, len(entry.command), effect[:3]) + entry.command,
                key=state.digest,
                digest_size=16,
            ).digest()
            compared = state.digest if control is None else state.digest + self.contents()
            self._observe(entry, effect, compared)
            results.append(Sealed(state.epoch.epoch) if is_outside else effect)
        return results

    def _apply_one(self, state: MachineState, entry: Entry) -> Effect:
        if not entry.command:
            return Effect(True, None, False)
        command = Command.decode(entry.command)
        if self.keeps_ledger and command.request in state.ledger:
            ok, value = state.ledger[command.request]
            return Effect(ok, value, False, command.request)
        current = state.registers.get(command.key, (None, 0))[0]
        ok, value = True, command.value
        if command.kind == "cas":
            ok = current == command.expected
        elif command.kind == "add":
            value += current or 0
        if ok:
            state.registers[command.key] = (value, entry.index)
        state.ledger[command.request] = (ok, value if ok else current)
        return Effect(ok, value if ok else current, True, command.request)

    def trim(self, slots: tuple[int, int]) -> None:
        pass  # what commands come to depends on all of it

    def restrict(self, slots: tuple[int, int]) -> None:
        state, slot_of = self._store.cached, self._store.slot_of
        state.registers = {
            key: value
            for key, value in state.registers.items()
            if slots[0] <= slot_of(key) < slots[1]
        }
        state.digest = digest_of_part(state.digest, *slots)

    def rebase(self, index: int, ended: int) -> None:
        state = self._store.cached
        state.applied_index, state.epoch = index, EpochState(ended, True)

    def strays(self, slots: tuple[int, int]) -> int:
        slots_of_keys = map(self._store.slot_of, self._store.cached.registers)
        return sum(not slots[0] <= slot < slots[1] for slot in slots_of_keys)

    def encode(self, command: Command, at_ms: int) -> bytes:
        return command.encode()

    def read(self, key: str) -> int | None:
        return self._store.cached.registers.get(key, (None, 0))[0]

    def outcome(self, request: str) -> Outcome | None:
        return self._store.cached.ledger.get(request)

    def contents(self) -> bytes:
        state = self._store.cached
        rows = repr((sorted(state.registers.items()), sorted(state.ledger.items()), state.epoch))
        return hashlib.blake2b(rows.encode(), digest_size=16).digest()

    def checkpoint(self) -> CheckpointJob | None:
        if (self.applied_index, self.digest()) == self._durable:
            return None  # what a split leaves has another digest at the same entry
        return CheckpointJob(self._store, self._store.cached.copy())

    def checkpoint_done(self, job: Any) -> None:
        if job.index >= self._durable[0]:
            self._durable = (job.index, job.digest)

    def digest(self) -> bytes:
        return self._store.cached.digest

    def close(self) -> None:
        pass
