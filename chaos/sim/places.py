"""Where a key is: which slot it has, and in the shard of which of the clients' groups.

Clients know groups: those that a world begins with. A split makes two shards of one, and each key
goes to the one with its slot. Keys have few slots, so that an owner with the same is soon found,
and splits cut between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from agentmem_cluster.ring import SLOTS, slot_of

TENANT = "acme"
BUCKETS = 16  # of a group's slots: keys have the first slot of one


class Place(NamedTuple):
    """A shard, as a node knows it. `slots`: [first, end)."""

    id: str
    epoch: int
    members: tuple[str, ...]
    slots: tuple[int, int]


class Places:
    """Of one world."""

    def __init__(self, groups: Iterable[str]) -> None:
        """`groups`: those that clients ask, with equal shares of all slots."""
        self._groups = list(groups)
        self._group_of: dict[str, str] = {}
        self._owners: dict[tuple[str, int], str] = {}

    def learn(self, shard: str, whole: str) -> None:
        """`shard` was made of `whole` by a split."""
        self._group_of[shard] = self.group_of(whole)

    def group_of(self, shard: str) -> str:
        """The group of which a shard is all, or a part."""
        return self._group_of.get(shard, shard)

    def range_of(self, group: str) -> tuple[int, int]:
        """The slots [first, end) that a group began with."""
        at, groups = self._groups.index(group), len(self._groups)
        return at * SLOTS // groups, (at + 1) * SLOTS // groups

    def bucket_slots(self, group: str) -> int:
        first, end = self.range_of(group)
        return (end - first) // BUCKETS

    def slot(self, group: str, key: str) -> int:
        bucket = hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % BUCKETS
        return self.range_of(group)[0] + bucket * self.bucket_slots(group)

    def owner(self, group: str, key: str) -> str:
        """An owner whose memories are where that key is, however the group was split."""
        first = self.slot(group, key)
        if (group, first) not in self._owners:
            slots = range(first, first + self.bucket_slots(group))
            self._owners[group, first] = next(
                owner
                for owner in (f"user:{number}" for number in range(SLOTS))
                if slot_of(TENANT, owner) in slots
            )
        return self._owners[group, first]
