"""Bytes between nodes that are lost, in one direction or both, for a while or now and then."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from agentmem_chaos.hosts.base import Need, Pair
from agentmem_chaos.nemeses.base import Field, Nemesis, both_ways

FLAP_S = (0.3, 1.2)


class _Partition(Nemesis):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PARTITION})
    # Long enough to see what the side without a majority answers.
    hold_s: ClassVar[tuple[float, float]] = (5.5, 7.0)
    wants_whole_cluster: ClassVar[bool] = True

    async def undo(self, field: Field) -> None:
        await field.hosts.cut(frozenset())


class PartitionOne(_Partition):
    name: ClassVar[str] = "partition-one"
    description: ClassVar[str] = "a leader is cut off from all other nodes; clients still reach it"

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        alone, rest = frozenset({node}), frozenset(field.nodes) - {node}
        self.victims, self.sides = alone, (alone, rest)
        await field.hosts.cut(both_ways(alone, rest))
        return f"{node} | {' '.join(sorted(rest))}"


class PartitionMajority(_Partition):
    """With three nodes: two and one, the one by chance. With five: three and two."""

    name: ClassVar[str] = "partition-majority"
    description: ClassVar[str] = "a majority and a minority, each whole, cannot hear each other"

    async def strike(self, field: Field) -> str:
        large = frozenset(field.a_majority())
        small = frozenset(field.nodes) - large
        self.victims, self.sides = small, (small, large)
        await field.hosts.cut(both_ways(small, large))
        return f"{' '.join(sorted(small))} | {' '.join(sorted(large))}"


class PartitionRing(_Partition):
    """Majorities overlap without agreeing on who is up. Three nodes in a ring would all see each
    other, so of three, two are cut and the third is a bridge."""

    name: ClassVar[str] = "partition-ring"
    description: ClassVar[str] = "every node sees its two neighbours only (of three: a bridge)"

    async def strike(self, field: Field) -> str:
        order = field.chance.sample(list(field.nodes), len(field.nodes))
        count = len(order)
        lost: set[Pair] = set()
        for i, first in enumerate(order):
            for j, second in enumerate(order):
                apart = (i - j) % count
                bridged = count == 3 and {i, j} == {0, 2}
                if i != j and (bridged or (count > 3 and apart not in (1, count - 1))):
                    lost.add((first, second))
        self.victims = frozenset(order)
        await field.hosts.cut(frozenset(lost))
        return " - ".join(order if count == 3 else [*order, order[0]])


class PartitionOneWay(_Partition):
    name: ClassVar[str] = "partition-one-way"
    description: ClassVar[str] = "a node hears all others, but none hears it; or the other way"

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        rest = [other for other in field.nodes if other != node]
        outgoing = field.chance.random() < 0.5
        self.victims = frozenset({node})
        lost = {(node, other) if outgoing else (other, node) for other in rest}
        await field.hosts.cut(frozenset(lost))
        return f"{node} is not heard" if outgoing else f"{node} hears nobody"


class Flapping(_Partition):
    name: ClassVar[str] = "partition-flapping"
    description: ClassVar[str] = "a node is cut off and reconnected several times a second"

    def __init__(self) -> None:
        super().__init__()
        self._task: asyncio.Task[None] | None = None
        # Asked to end, not cancelled: a cut that is interrupted halfway may stay behind unknown.
        self._over = asyncio.Event()

    async def strike(self, field: Field) -> str:
        node = field.a_node()
        alone, rest = frozenset({node}), frozenset(field.nodes) - {node}
        self.victims = alone
        self._task = asyncio.create_task(self._flap(field, both_ways(alone, rest)))
        return f"{node} flaps"

    async def _flap(self, field: Field, lost: frozenset[Pair]) -> None:
        while not self._over.is_set():
            for now_lost in (lost, frozenset[Pair]()):
                await field.hosts.cut(now_lost)
                try:
                    async with asyncio.timeout(field.chance.uniform(*FLAP_S)):
                        await self._over.wait()
                except TimeoutError:
                    pass

    async def undo(self, field: Field) -> None:
        self._over.set()
        try:
            if self._task is not None:
                await self._task
        finally:
            await super().undo(field)
