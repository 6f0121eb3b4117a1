"""Add, search and delete, as agents do; every text holds a word that no other has."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import ClassVar

from agentmem_chaos.hosts.settings import VECTOR_DIM
from agentmem_chaos.workloads.base import Arena, Workload
from agentmem_chaos.workloads.history import Outcome
from agentmem_client import AsyncClient, NotFound

OWNERS = 12
TOP_K = 10
_SUBJECTS = ("tea", "the garden", "trains to Oslo", "a birthday", "the invoice", "running")


@dataclass(frozen=True, slots=True)
class Mine:
    """A memory whose add was acknowledged to this client."""

    memory_id: str
    word: str
    owner: str


def vector_of(word: str) -> list[float]:
    """A direction of its own for each word, the same at every call."""
    chance = random.Random(hashlib.sha256(word.encode()).digest())
    return [chance.gauss(0.0, 1.0) for _ in range(VECTOR_DIM)]


class Memories(Workload):
    name: ClassVar[str] = "memory"
    description: ClassVar[str] = "add, search and delete memories of a dozen owners"
    checkers: ClassVar[tuple[str, ...]] = ("memories", "search")

    def __init__(self) -> None:
        self._mine: dict[int, list[Mine]] = {}
        self._serial = 0

    async def step(self, arena: Arena, number: int, chance: random.Random) -> None:
        client = arena.clients[number]
        mine = self._mine.setdefault(number, [])
        draw = chance.random()
        if draw < 0.4 or not mine:
            await self._add(arena, client, number, chance)
        elif draw < 0.85:
            await self._search(arena, client, number, chance.choice(mine))
        else:
            one = mine.pop(chance.randrange(len(mine)))
            await self._delete(arena, client, number, one)

    async def _add(
        self, arena: Arena, client: AsyncClient, number: int, chance: random.Random
    ) -> None:
        self._serial += 1
        # Letters and digits mixed: no stemmer makes two of these one.
        word = f"w{arena.seed % 1000}x{number}q{self._serial}z"
        owner = f"memory-{chance.randrange(OWNERS)}"
        arena.owners[owner] = self.name
        text = f"{word} said something about {chance.choice(_SUBJECTS)}"
        op = arena.history.begin(number, "add", word, owner, value=text)
        call = client.add(text, user_id=owner, vector=vector_of(word))
        added, _ = await arena.history.attempt(op, call)
        if added is not None:
            memory_id = added.results[0].id
            assert memory_id is not None
            arena.history.returned(op, Outcome.OK, memory_id)
            self._mine.setdefault(number, []).append(Mine(memory_id, word, owner))

    async def _search(self, arena: Arena, client: AsyncClient, number: int, one: Mine) -> None:
        op = arena.history.begin(number, "search", one.word, one.owner)
        call = client.search(one.word, user_id=one.owner, vector=vector_of(one.word), top_k=TOP_K)
        found, _ = await arena.history.attempt(op, call, is_read=True)
        if found is None:
            return
        if found.partial:
            op.code = "partial"
            arena.history.returned(op, Outcome.FAILED)
            return
        arena.history.returned(op, Outcome.OK, any(hit.id == one.memory_id for hit in found))

    async def _delete(self, arena: Arena, client: AsyncClient, number: int, one: Mine) -> None:
        op = arena.history.begin(number, "delete", one.word, one.owner)
        call = client.delete(one.memory_id)
        _, error = await arena.history.attempt(op, call)
        if error is None:
            arena.history.returned(op, Outcome.OK, True)
        elif isinstance(error, NotFound):
            # Acknowledged, deleted by nobody else, and gone: the checker has a word for it.
            arena.history.returned(op, Outcome.OK, False)
        else:
            # After an unknown delete nothing is certain about it; after a refused one it is there.
            if op.outcome is Outcome.FAILED:
                self._mine.setdefault(number, []).append(one)
