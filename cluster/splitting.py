"""How a shard's range of slots is cut in two, and what the new half is called."""

from __future__ import annotations

from dataclasses import dataclass

from agentmem_cluster.errors import BadRequest, InvalidField
from agentmem_cluster.shardmap import ShardMap

_NUMBER_MAX = 99_999  # of a shard's id, s00 to s99999


@dataclass(frozen=True, slots=True)
class Split:
    """`shard` keeps the lower slots, `new_shard` gets the upper ones. Ranges end exclusively."""

    shard: str
    new_shard: str
    kept_slots: tuple[int, int]
    new_slots: tuple[int, int]


def split_ranges(map: ShardMap, shard: str, at_slot: int | None = None) -> Split:
    """Cut `shard` before `at_slot`, or in the middle.

    The new shard's number is one above the highest there is. A split keeps the old id and no
    shard ever goes away, so an id never comes twice: directories and journals may go by it.
    Raises InvalidField for a shard or slot that is not there, BadRequest when it has one slot.
    """
    if shard not in map.shards:
        raise no_such_shard(map, shard)
    info = map.shards[shard]
    start, end = info.slot_start, info.slot_end
    if end - start < 2:
        raise BadRequest(
            f"Shard {shard} has slot {start} alone and cannot be split.",
            hint="An owner's memories stay together: nothing smaller than a slot is ever moved.",
            shard=shard,
        )
    cut = (start + end) // 2 if at_slot is None else at_slot
    if not start < cut < end:
        raise InvalidField(
            f"Shard {shard} cannot be split at slot {cut}: it has slots {start} to {end - 1}.",
            hint=f"Choose a slot from {start + 1} to {end - 1}.",
            field="at_slot",
        )
    number = 1 + max(int(name[1:]) for name in map.shards)
    if number > _NUMBER_MAX:
        raise BadRequest(
            f"Shard {shard} cannot be split: no id above s{_NUMBER_MAX} is left.",
            hint="Found a new cluster from a backup to number shards afresh.",
        )
    return Split(shard, f"s{number:02d}", (start, cut), (cut, end))


def no_such_shard(map: ShardMap, shard: str) -> InvalidField:
    return InvalidField(
        f"There is no shard {shard!r}.",
        hint=f"There are {len(map.shards)}, such as {next(iter(map.shards))}.",
        field="shard",
    )
