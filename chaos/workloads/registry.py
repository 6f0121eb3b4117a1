"""The workloads by name."""

from __future__ import annotations

import random
from typing import ClassVar

from agentmem_chaos.workloads.base import Arena, Workload
from agentmem_chaos.workloads.counters import Counters
from agentmem_chaos.workloads.memories import Memories
from agentmem_chaos.workloads.registers import Registers


class Mixed(Workload):
    """All of them side by side; each client changes what it does from step to step."""

    name: ClassVar[str] = "mixed"
    description: ClassVar[str] = "registers, memories and counters side by side"
    checkers: ClassVar[tuple[str, ...]] = (
        *Registers.checkers,
        *Memories.checkers,
        *Counters.checkers,
    )

    def __init__(self) -> None:
        self._parts: tuple[Workload, ...] = (Registers(), Memories(), Counters())

    async def step(self, arena: Arena, number: int, chance: random.Random) -> None:
        await chance.choice(self._parts).step(arena, number, chance)

    async def finish(self, arena: Arena) -> None:
        for part in self._parts:
            await part.finish(arena)


WORKLOADS: dict[str, type[Workload]] = {
    kind.name: kind for kind in (Registers, Memories, Counters, Mixed)
}
