"""What a nemesis is, and what it may look at and touch."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from agentmem_chaos.checkers.base import Damage
from agentmem_chaos.hosts.base import Hosts, Need, Pair


@dataclass(slots=True)
class Field:
    """Where a nemesis acts. `leaders`: shard to node, as the observer saw it last.

    `members`: shard to the nodes that hold its replicas.
    """

    hosts: Hosts
    chance: random.Random
    leaders: Callable[[], Mapping[str, str]]
    members: Callable[[], Mapping[str, tuple[str, ...]]]

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.hosts.nodes

    def a_leader(self) -> str:
        """A node that leads some shard; any node while nobody is known to."""
        leading = sorted(set(self.leaders().values()) & set(self.nodes))
        return self.chance.choice(leading or list(self.nodes))

    def a_follower(self) -> str:
        """The node that leads the fewest shards."""
        led = Counter(self.leaders().values())
        fewest = min(led.get(node, 0) for node in self.nodes)
        return self.chance.choice([n for n in self.nodes if led.get(n, 0) == fewest])

    def a_node(self) -> str:
        return self.chance.choice(list(self.nodes))

    def a_majority(self) -> tuple[str, ...]:
        return tuple(self.chance.sample(list(self.nodes), len(self.nodes) // 2 + 1))


class Nemesis(ABC):
    """One object a strike. `undo` must leave nothing behind even when `strike` failed midway.

    `hold_s`: how long it is held, drawn from this range.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    hold_s: ClassVar[tuple[float, float]] = (3.0, 6.0)
    # Whether a node that it befalls may end by itself, which is a crash at any other time.
    may_end_nodes: ClassVar[bool] = False
    # Whether it strikes a whole cluster only: what one node loses, the others must have.
    wants_whole_cluster: ClassVar[bool] = False

    def __init__(self) -> None:
        self.victims: frozenset[str] = frozenset()
        # Groups of nodes that can talk to each other while it holds; None: everybody can.
        self.sides: tuple[frozenset[str], ...] | None = None
        # What became of a node whose files it damaged.
        self.damage: Damage | None = None

    @abstractmethod
    async def strike(self, field: Field) -> str:
        """What was done, in a few words. Raises ChaosError."""

    @abstractmethod
    async def undo(self, field: Field) -> None:
        """Raises ChaosError."""


def both_ways(first: frozenset[str], second: frozenset[str]) -> frozenset[Pair]:
    """Every pair of a node here and a node there, in both directions."""
    there = {(a, b) for a in first for b in second if a != b}
    return frozenset(there | {(b, a) for a, b in there})
