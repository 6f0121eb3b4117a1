"""A memory as a register: get is read, update is write, update with `expected_version` is cas."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

from agentmem_chaos.workloads.base import Arena, Workload
from agentmem_chaos.workloads.history import Outcome
from agentmem_client import AsyncClient, Conflict, Memory, NotFound

# The search for a linearization is exponential in the operations that overlap on one key, and an
# unanswered one overlaps with all that follow: few writers, and a new key after so many operations.
WRITERS_MAX = 5
OPS_MAX_PER_KEY = 80
LIVE_KEYS = 3
INITIAL = "initial"
ABSENT = "(absent)"


@dataclass(slots=True)
class _Register:
    key: str
    memory_id: str
    owner: str
    ops: int = 0
    # What each client read last: (version, content), for its next cas.
    seen: dict[int, tuple[int, str]] = field(default_factory=dict)


class Registers(Workload):
    name: ClassVar[str] = "register"
    description: ClassVar[str] = "read, write and compare-and-set of memories, several clients each"
    checkers: ClassVar[tuple[str, ...]] = ("linearizable",)

    def __init__(self) -> None:
        self._live: dict[tuple[int, int], _Register] = {}
        self._all: list[_Register] = []
        self._serial = 0

    async def step(self, arena: Arena, number: int, chance: random.Random) -> None:
        client = arena.clients[number]
        place = (number // WRITERS_MAX, chance.randrange(LIVE_KEYS))
        register = self._live.get(place)
        if register is None or register.ops >= OPS_MAX_PER_KEY:
            self._live.pop(place, None)
            await self._create(arena, client, number, place)
            return
        register.ops += 1
        draw = chance.random()
        if draw < 0.45:
            await self._read(arena, client, number, register)
        elif draw < 0.75 or number not in register.seen:
            await self._write(arena, client, number, register)
        else:
            await self._cas(arena, client, number, register)

    async def finish(self, arena: Arena) -> None:
        for register in self._all:
            await self._read(arena, arena.clients[0], 0, register)

    async def _create(
        self, arena: Arena, client: AsyncClient, number: int, place: tuple[int, int]
    ) -> None:
        self._serial += 1
        key = f"r{self._serial}"
        owner = f"register-{key}"
        arena.owners[owner] = self.name
        op = arena.history.begin(number, "create", key, owner, value=INITIAL)
        call = client.add(INITIAL, user_id=owner)
        added, error = await arena.history.attempt(op, call)
        if added is None or error is not None:
            return
        memory_id = added.results[0].id
        assert memory_id is not None
        arena.history.returned(op, Outcome.OK, memory_id)
        register = _Register(key, memory_id, owner)
        self._all.append(register)
        self._live.setdefault(place, register)

    async def _read(
        self, arena: Arena, client: AsyncClient, number: int, register: _Register
    ) -> None:
        op = arena.history.begin(number, "read", register.key, register.owner)
        call = client.get(register.memory_id)
        memory, error = await arena.history.attempt(op, call, is_read=True)
        if isinstance(error, NotFound):
            arena.history.returned(op, Outcome.OK, ABSENT)  # nobody deletes registers
        elif memory is not None:
            register.seen[number] = (memory.version, memory.content)
            arena.history.returned(op, Outcome.OK, memory.content, memory.version + 0.5)

    async def _write(
        self, arena: Arena, client: AsyncClient, number: int, register: _Register
    ) -> None:
        value = self._new_value(number)
        op = arena.history.begin(number, "write", register.key, register.owner, value=value)
        call = client.update(register.memory_id, value)
        memory, error = await arena.history.attempt(op, call)
        if isinstance(error, NotFound):
            arena.history.returned(op, Outcome.FAILED, ABSENT)
        elif memory is not None:
            arena.history.returned(op, Outcome.OK, True, _order(memory, value))

    async def _cas(
        self, arena: Arena, client: AsyncClient, number: int, register: _Register
    ) -> None:
        version, expected = register.seen.pop(number)
        value = self._new_value(number)
        op = arena.history.begin(
            number, "cas", register.key, register.owner, value=value, expected=expected
        )
        call = client.update(register.memory_id, value, expected_version=version)
        memory, error = await arena.history.attempt(op, call)
        if isinstance(error, Conflict):
            current = error.details.get("current_version")
            order = current + 0.5 if isinstance(current, int) else None
            arena.history.returned(op, Outcome.OK, False, order)
        elif isinstance(error, NotFound):
            arena.history.returned(op, Outcome.FAILED, ABSENT)
        elif memory is not None:
            arena.history.returned(op, Outcome.OK, True, _order(memory, value))

    def _new_value(self, number: int) -> str:
        self._serial += 1
        return f"v{number}.{self._serial}"


def _order(memory: Memory, value: str) -> float | None:
    """The version that a write made. A repeated write is answered with what came after it."""
    return float(memory.version) if memory.content == value else None
