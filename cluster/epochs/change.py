"""A change of a shard's epoch, as the meta group keeps it: a value, and the phases it goes through.

    copy ──▶ founded ──▶ (gone)
      └────▶ (gone: given up)

*copy*: new members copy the state and follow the log, epoch e serves, and is sealed in the end.
*founded*: the shard map names epoch e+1; from this moment, which is one entry of the meta group's
log, e+1 is the shard's epoch. The change stays until all of its members serve.

Whatever moves a shard is such a change: a move to other nodes, a node or a disk that was lost, a
replica too far behind (all: other members, or the same), a split (two targets), a restore (a
source that is no replica).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from agentmem_cluster.shardmap import ShardInfo, ShardMap

FORMAT: Final = 1
_TEXT_CHARS_MAX: Final = 1_024
_TARGETS_MAX: Final = 2
_INTEGER_END: Final = 1 << 63


class Phase(Enum):
    COPY = "copy"
    FOUNDED = "founded"


@dataclass(frozen=True, slots=True)
class Base:
    """Where an epoch's log begins: the seal of the one before, which is its last entry."""

    index: int
    term: int


@dataclass(frozen=True, slots=True)
class Change:
    """`targets`: the shard as it will be; for a split, both of its parts, the old id first.

    `fresh`: members whose replica of the old epoch is lost or of no use, and is copied anew.
    `source`: what the new epoch's state is read from instead of the old one; "" for a replica.
    """

    id: str
    shard: str
    from_epoch: int
    old_members: tuple[str, ...]
    targets: tuple[ShardInfo, ...]
    phase: Phase = Phase.COPY
    base: Base | None = None
    fresh: tuple[str, ...] = ()
    source: str = ""
    reason: str = ""
    operation: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not 1 <= len(self.targets) <= _TARGETS_MAX or self.targets[0].id != self.shard:
            raise ValueError(f"change {self.id}: its targets are not shard {self.shard}")
        for target in self.targets:
            if target.epoch != self.from_epoch + 1:
                raise ValueError(f"change {self.id}: {target.id} is not to have the next epoch")
        if (self.base is None) != (self.phase is Phase.COPY):
            raise ValueError(f"change {self.id}: a base belongs to a founded epoch")
        if not self.old_members:
            raise ValueError(f"change {self.id}: the old epoch has no members")

    @property
    def to_epoch(self) -> int:
        return self.from_epoch + 1

    @property
    def is_split(self) -> bool:
        return len(self.targets) > 1

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that it concerns, sorted."""
        found = set(self.old_members)
        for target in self.targets:
            found.update(target.members)
        return tuple(sorted(found))

    def target_of(self, shard: str) -> ShardInfo | None:
        return next((target for target in self.targets if target.id == shard), None)

    def keeps_its_state(self, node: str, shard: str) -> bool:
        """Whether a member of the target goes on with the replica that it has."""
        return (
            shard == self.shard
            and not self.is_split
            and not self.source
            and node in self.old_members
            and node not in self.fresh
        )

    def founded(self, base: Base) -> Change:
        return replace(self, phase=Phase.FOUNDED, base=base)

    def apply_to(self, shard_map: ShardMap) -> ShardMap:
        """The map in which the targets serve. Raises ValueError when it was changed otherwise."""
        current = shard_map.shards.get(self.shard)
        if current is None or current.epoch != self.from_epoch:
            raise ValueError(f"shard {self.shard} is not at epoch {self.from_epoch}")
        shards = dict(shard_map.shards)
        for target in self.targets:
            if target.id != self.shard and target.id in shards:
                raise ValueError(f"there is a shard {target.id} already")
            shards[target.id] = target
        return ShardMap(shard_map.version + 1, shards)

    # -- on the wire ---------------------------------------------------------------------------

    def to_wire(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "id": self.id,
            "shard": self.shard,
            "from_epoch": self.from_epoch,
            "old_members": list(self.old_members),
            "targets": [
                [t.id, t.epoch, list(t.members), t.preferred_leader, t.slot_start, t.slot_end]
                for t in self.targets
            ],
            "phase": self.phase.value,
            "base": None if self.base is None else [self.base.index, self.base.term],
            "fresh": list(self.fresh),
            "source": self.source,
            "reason": self.reason,
            "operation": self.operation,
        }

    @classmethod
    def from_wire(cls, wire: Any) -> Change:
        """Raises ValueError for anything that `to_wire` could not have made."""
        if not isinstance(wire, dict) or wire.get("format") != FORMAT:
            raise ValueError(f"a change of format {FORMAT} was expected")
        base = wire.get("base")
        return cls(
            id=_text(wire, "id"),
            shard=_text(wire, "shard"),
            from_epoch=_count(wire.get("from_epoch")),
            old_members=_names(wire.get("old_members")),
            targets=tuple(_target(row) for row in _rows(wire.get("targets"))),
            phase=Phase(wire.get("phase")),
            base=None if base is None else Base(*(_count(value) for value in _rows(base))),
            fresh=_names(wire.get("fresh")),
            source=_text(wire, "source"),
            reason=_text(wire, "reason"),
            operation=_text(wire, "operation"),
        )


def _rows(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("change: a list was expected")
    return list(value)


def _names(value: Any) -> tuple[str, ...]:
    names = tuple(_rows(value))
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("change: node ids were expected")
    return names


def _target(row: Any) -> ShardInfo:
    values = _rows(row)
    if len(values) != 6:
        raise ValueError("change: a target is not a list of six values")
    name, epoch, members, preferred, start, end = values
    return ShardInfo(name, epoch, _names(members), preferred, start, end)


def _text(wire: dict[str, Any], name: str) -> str:
    value = wire.get(name)
    if not isinstance(value, str) or len(value) > _TEXT_CHARS_MAX:
        raise ValueError(f"change: {name} is not a text of at most {_TEXT_CHARS_MAX} characters")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _INTEGER_END:
        raise ValueError("change: an integer of 0 or more was expected")
    return value
