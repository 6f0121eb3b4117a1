"""Splits: the two halves are the whole, and no shard's id comes twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import BadRequest, InvalidField
from agentmem_cluster.placement import split_ranges
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from tests.placement.worlds import make_map

SIXTEEN = make_map({f"s{i:02d}": ["n1", "n2", "n3"] for i in range(16)})


def split_once(shard_map: ShardMap, shard: str, at_slot: int | None = None) -> ShardMap:
    split = split_ranges(shard_map, shard, at_slot)
    old = shard_map.shards[shard]
    halves = {
        name: ShardInfo(name, 1, old.members, old.preferred_leader, start, end)
        for name, (start, end) in (
            (split.shard, split.kept_slots),
            (split.new_shard, split.new_slots),
        )
    }
    assert split.new_shard not in shard_map.shards
    return ShardMap(shard_map.version + 1, shard_map.shards | halves)  # covers every slot once


@given(st.data())
def test_splits_of_splits_cover_every_slot_and_never_repeat_an_id(data: st.DataObject) -> None:
    shard_map, used = SIXTEEN, set(SIXTEEN.shards)
    for _ in range(data.draw(st.integers(1, 20))):
        shard = data.draw(st.sampled_from(sorted(shard_map.shards)))
        info = shard_map.shards[shard]
        if info.slot_end - info.slot_start < 2:
            continue
        at_slot = data.draw(st.none() | st.integers(info.slot_start + 1, info.slot_end - 1))
        shard_map = split_once(shard_map, shard, at_slot)
        (new,) = set(shard_map.shards) - used
        used.add(new)


def test_a_shard_is_cut_in_the_middle_and_the_new_half_gets_the_next_id() -> None:
    split = split_ranges(SIXTEEN, "s03")
    assert (split.shard, split.new_shard) == ("s03", "s16")
    assert (split.kept_slots, split.new_slots) == ((3072, 3584), (3584, 4096))


def test_ids_go_on_above_99() -> None:
    many = make_map({f"s{i:02d}": ["n1"] for i in range(100)})
    assert split_ranges(many, "s00").new_shard == "s100"


@pytest.mark.parametrize("at_slot", [-1, 0, 1024, 99_999])
def test_a_cut_at_the_edge_or_outside_is_refused(at_slot: int) -> None:
    with pytest.raises(InvalidField, match=f"at slot {at_slot}: it has slots 0 to 1023"):
        split_ranges(SIXTEEN, "s00", at_slot)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InvalidField, match="no shard 's99'"):
        split_ranges(SIXTEEN, "s99")
    small = ShardMap(
        1,
        {
            "s00": ShardInfo("s00", 1, ("n1",), "n1", 0, 1),
            "s99999": ShardInfo("s99999", 1, ("n1",), "n1", 1, 16_384),
        },
    )
    with pytest.raises(BadRequest, match="slot 0 alone"):
        split_ranges(small, "s00")
    with pytest.raises(BadRequest, match="no id above s99999"):
        split_ranges(small, "s99999")
