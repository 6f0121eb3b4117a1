"""States of shards that were kept, and shards that were taken back to them.

A rewind undoes what was acknowledged since, by order. So of its shard every key has the kept value
from some moment on between the seal and the beginning of the next epoch; and a request whose effect
was undone may take effect again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace

from agentmem_chaos.checker import Kind, Operation
from agentmem_chaos.sim.places import Places

REWINDS = -1  # the client that they are in histories


@dataclass(frozen=True, slots=True, eq=False)
class EffectAt:
    """What a request did, where: at an entry of a shard's log."""

    shard: str
    index: int
    ok: bool
    value: int | None


@dataclass(frozen=True, slots=True)
class KeptState:
    """A shard as it was at an entry. `head`, `chunks`: as a copy of it travels."""

    id: str
    shard: str
    slots: tuple[int, int]
    index: int
    term: int
    digest: bytes
    head: object
    chunks: tuple[bytes, ...]
    values: dict[str, Hashable]  # by key; of all others nothing was there
    effects: frozenset[EffectAt]  # of the shard's own log that were in force


@dataclass(slots=True)
class Rewind:
    kept: KeptState
    epoch: int  # that began with it
    base_index: int
    sealed_s: float
    began_s: float = float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class AtVersion:
    """Equals every (version, content) of that version."""

    version: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and other[0] == self.version

    def __hash__(self) -> int:
        return hash(self.version)


class Rewinds:
    """Of one world."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.kept: dict[str, KeptState] = {}
        self._rewinds: dict[tuple[str, int], Rewind] = {}  # by shard and the epoch that began

    def keep(self, state: KeptState) -> None:
        self.kept[state.id] = state

    def fitting(self, shard: str, slots: tuple[int, int]) -> list[KeptState]:
        return [k for k in self.kept.values() if (k.shard, k.slots) == (shard, slots)]

    def founded(self, source: str, epoch: int, base_index: int, sealed_s: float) -> KeptState:
        kept = self.kept[source]
        self._rewinds[kept.shard, epoch] = Rewind(kept, epoch, base_index, sealed_s)
        return kept

    def began(self, shard: str, epoch: int, at_s: float) -> None:
        if (shard, epoch) in self._rewinds:
            self._rewinds[shard, epoch].began_s = at_s

    def of(self, shard: str, epoch: int) -> Rewind | None:
        return self._rewinds.get((shard, epoch))

    @property
    def count(self) -> int:
        return len(self._rewinds)

    def as_shards_compare(self, operations: list[Operation]) -> list[Operation]:
        """A shard compares versions. They say which content is meant, unless a rewind let them
        begin anew."""
        if not self._rewinds:
            return operations
        return [
            replace(one, expected=AtVersion(one.expected[0]))
            if isinstance(one.expected, tuple)
            else one
            for one in operations
        ]

    def operations(self, keys: Iterable[tuple[str, str]]) -> list[Operation]:
        """As writes of the kept values to each (group, key)."""
        asked = set(keys)
        slot: Callable[[str, str], int] = self._places.slot
        return [
            Operation(
                REWINDS,
                f"{group}/{key}",
                rewind.sealed_s,
                rewind.began_s,
                Kind.WRITE,
                rewind.kept.values.get(key),
                order=rewind.base_index,
            )
            for rewind in self._rewinds.values()
            for group, key in sorted(asked)
            if self._places.group_of(rewind.kept.shard) == group
            and rewind.kept.slots[0] <= slot(group, key) < rewind.kept.slots[1]
        ]
