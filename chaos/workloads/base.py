"""What a workload is, and what it is given."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from agentmem_chaos.workloads.history import History
from agentmem_client import AsyncClient

# A call's whole time, retries included: longer than an election, shorter than most faults. Every
# other client is impatient: it gives up in the middle of elections, and its writes are unknown.
CALL_S_MAX = 5.0
IMPATIENT_S_MAX = 0.8
# Between two calls of a client, on average: the machine also runs the nodes.
THINK_S_MEAN = 0.03


@dataclass(slots=True)
class Arena:
    """Clients, each with connections of its own, and the common record.

    `stopping`: no new operation is begun once it is set.
    """

    clients: Sequence[AsyncClient]
    history: History
    seed: int
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    # Owners whose memories the audit looks through at the end, and whose are one workload's.
    owners: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def patience_s(number: int) -> float:
        """The deadline of the calls of client `number`."""
        return IMPATIENT_S_MAX if number % 2 else CALL_S_MAX

    def chance(self, *of: object) -> random.Random:
        return random.Random(f"{self.seed}:{':'.join(map(str, of))}")

    async def think(self, chance: random.Random) -> None:
        """Pause between calls; ends early when the run does."""
        try:
            async with asyncio.timeout(chance.expovariate(1 / THINK_S_MEAN)):
                await self.stopping.wait()
        except TimeoutError:
            pass


class Workload(ABC):
    """`name` and `claim` are shown by `agentmem-chaos list`; `checkers` are the names of those
    that have something to say about it, beside those that look at every run."""

    name: ClassVar[str]
    description: ClassVar[str]
    checkers: ClassVar[tuple[str, ...]]

    @abstractmethod
    async def step(self, arena: Arena, number: int, chance: random.Random) -> None:
        """One operation of client `number`."""

    async def finish(self, arena: Arena) -> None:  # noqa: B027
        """After the last fault is healed: what only a calm cluster can be asked."""

    async def run_client(self, arena: Arena, number: int) -> None:
        chance = arena.chance(self.name, number)
        while not arena.stopping.is_set():
            await self.step(arena, number, chance)
            await arena.think(chance)
