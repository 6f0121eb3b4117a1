"""The shard map: which range of slots is which shard, at which epoch, on which nodes.

A value. The meta group replicates it; a newer version replaces an older one whole. A map that
exists is valid: its shards cover every slot exactly once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentmem_cluster.ring import SLOTS, assign, slot_of

# Format 2 says no more than 1 does, but that shards were moved: a program that knows only 1 must
# not serve such a cluster.
_FORMATS = (1, 2)
_SHARD_ID = re.compile(r"s[0-9]{2,5}")
_NODE_ID_CHARS_MAX = 64
_MEMBERS_MAX = 31
_INTEGER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard at one epoch; its members never change. Raises ValueError when it is not valid."""

    id: str
    epoch: int
    members: tuple[str, ...]  # sorted
    preferred_leader: str
    slot_start: int
    slot_end: int  # exclusive

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or _SHARD_ID.fullmatch(self.id) is None:
            raise ValueError(f"shard id {self.id!r} is not s00 to s99999")
        for name, value, least, most in (
            ("epoch", self.epoch, 1, _INTEGER_MAX),
            ("slot_start", self.slot_start, 0, SLOTS - 1),
            ("slot_end", self.slot_end, 1, SLOTS),
        ):
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"shard {self.id}: {name} {value!r} is not in {least}..{most}")
        if self.slot_start >= self.slot_end:
            raise ValueError(f"shard {self.id}: slots {self.slot_start}..{self.slot_end} are none")
        if not isinstance(self.members, tuple) or not 1 <= len(self.members) <= _MEMBERS_MAX:
            raise ValueError(f"shard {self.id}: it has no members, or more than {_MEMBERS_MAX}")
        if not all(isinstance(m, str) and 0 < len(m) <= _NODE_ID_CHARS_MAX for m in self.members):
            raise ValueError(f"shard {self.id}: a member is not the id of a node")
        if list(self.members) != sorted(set(self.members)):
            raise ValueError(f"shard {self.id}: members are not sorted, or one is named twice")
        if self.preferred_leader not in self.members:
            raise ValueError(f"shard {self.id}: its preferred leader is not a member")


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Raises ValueError when the shards leave a slot out, or claim one twice."""

    version: int
    shards: dict[str, ShardInfo]  # by id, in the order of their slots
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _by_range: tuple[ShardInfo, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 1 <= self.version <= _INTEGER_MAX:
            raise ValueError(f"shard map version {self.version!r} is not a positive integer")
        ordered = sorted(self.shards.values(), key=lambda s: (s.slot_start, s.slot_end))
        covered = 0
        for shard in ordered:
            if shard.slot_start != covered:
                fault = "no shard has" if shard.slot_start > covered else "two shards have"
                at = min(covered, shard.slot_start)
                raise ValueError(f"shard map: {fault} slot {at} (before shard {shard.id})")
            covered = shard.slot_end
        if covered != SLOTS:
            raise ValueError(f"shard map: no shard has slot {covered}")
        if any(name != shard.id for name, shard in self.shards.items()):
            raise ValueError("shard map: a shard stands under another's id")
        object.__setattr__(self, "shards", {s.id: s for s in ordered})
        object.__setattr__(self, "_starts", tuple(s.slot_start for s in ordered))
        object.__setattr__(self, "_by_range", tuple(ordered))

    def shard_of(self, tenant: str, owner: str) -> ShardInfo:
        return self.shard_of_slot(slot_of(tenant, owner))

    def shard_of_slot(self, slot: int) -> ShardInfo:
        """Raises ValueError when `slot` is not within 0..16383."""
        if not 0 <= slot < SLOTS:
            raise ValueError(f"slot {slot} is not within 0..{SLOTS - 1}")
        return self._by_range[bisect_right(self._starts, slot) - 1]

    def shards_of_node(self, node: str) -> list[ShardInfo]:
        return [shard for shard in self._by_range if node in shard.members]

    def nodes(self) -> set[str]:
        """Every node that has a replica of some shard."""
        return {member for shard in self._by_range for member in shard.members}

    def to_wire(self) -> dict[str, Any]:
        """Plain values for msgpack or JSON."""
        return {
            "format": 1 if all(s.epoch == 1 for s in self._by_range) else 2,
            "version": self.version,
            "shards": [
                [s.id, s.epoch, list(s.members), s.preferred_leader, s.slot_start, s.slot_end]
                for s in self._by_range
            ],
        }

    @classmethod
    def from_wire(cls, wire: Any) -> ShardMap:
        """Raises ValueError for anything that `to_wire` could not have made."""
        if not isinstance(wire, Mapping) or wire.get("format") not in _FORMATS:
            raise ValueError(f"a shard map of format {_FORMATS[-1]} or before was expected")
        rows = wire.get("shards")
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes) or len(rows) > SLOTS:
            raise ValueError("shard map: `shards` is not a list")
        shards = [_shard_from_wire(row) for row in rows]
        by_id = {shard.id: shard for shard in shards}
        if len(by_id) != len(shards):
            raise ValueError("shard map: a shard stands there twice")
        return cls(version=wire.get("version", 0), shards=by_id)

    @classmethod
    def initial(cls, nodes: Iterable[str], shards: int = 16, replication: int = 3) -> ShardMap:
        """The first map of a new cluster: equal ranges of slots over all `nodes`."""
        if not 1 <= shards <= 1024:
            raise ValueError(f"{shards} shards: a cluster has 1 to 1024")
        names = [f"s{i:02d}" for i in range(shards)]
        placed = assign(names, sorted(nodes), replication)
        return cls(
            version=1,
            shards={
                name: ShardInfo(
                    id=name,
                    epoch=1,
                    members=tuple(sorted(placed[name])),
                    preferred_leader=placed[name][0],
                    slot_start=i * SLOTS // shards,
                    slot_end=(i + 1) * SLOTS // shards,
                )
                for i, name in enumerate(names)
            },
        )


def _shard_from_wire(row: Any) -> ShardInfo:
    if not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) != 6:
        raise ValueError("shard map: a shard is not a list of six values")
    name, epoch, members, preferred, start, end = row
    if not isinstance(members, Sequence) or isinstance(members, str | bytes):
        raise ValueError("shard map: the members of a shard are not a list")
    return ShardInfo(name, epoch, tuple(members), preferred, start, end)
