"""The shard map: every slot belongs to one shard, and a map that is not valid does not exist."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.ring import SLOTS, slot_of
from agentmem_cluster.shardmap import ShardInfo, ShardMap

NODES = st.lists(
    st.text("abcdefghij-", min_size=1, max_size=6), min_size=1, max_size=9, unique=True
)


@st.composite
def maps(draw: st.DrawFn) -> ShardMap:
    cuts = sorted(draw(st.sets(st.integers(1, SLOTS - 1), max_size=20)))
    nodes = draw(NODES)
    shards = {}
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, SLOTS], strict=True)):
        members = tuple(sorted(draw(st.sets(st.sampled_from(nodes), min_size=1, max_size=3))))
        name = f"s{i * 7 % 100:02d}"
        shards[name] = ShardInfo(
            name, draw(st.integers(1, 99)), members, draw(st.sampled_from(members)), start, end
        )
    return ShardMap(draw(st.integers(1, 1 << 40)), shards)


@given(maps())
def test_a_map_survives_the_wire(shard_map: ShardMap) -> None:
    wire = shard_map.to_wire()
    assert ShardMap.from_wire(wire) == shard_map
    assert ShardMap.from_wire(msgpack.unpackb(msgpack.packb(wire))) == shard_map
    assert ShardMap.from_wire(json.loads(json.dumps(wire))) == shard_map


@given(maps(), st.integers(0, SLOTS - 1))
def test_every_slot_has_the_shard_whose_range_holds_it(shard_map: ShardMap, slot: int) -> None:
    shard = shard_map.shard_of_slot(slot)
    assert shard.slot_start <= slot < shard.slot_end
    assert shard_map.shards[shard.id] is shard


@given(maps(), st.data())
def test_any_change_of_the_wire_is_another_valid_map_or_a_value_error(
    shard_map: ShardMap, data: st.DataObject
) -> None:
    wire = shard_map.to_wire()
    row = data.draw(st.integers(0, len(wire["shards"]) - 1))
    column = data.draw(st.integers(0, 5))
    junk = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.text(max_size=3))
    wire["shards"][row][column] = data.draw(junk)
    try:
        changed = ShardMap.from_wire(wire)
    except ValueError:
        return
    assert [changed.shard_of_slot(slot) for slot in range(0, SLOTS, 512)]


@given(
    st.none()
    | st.integers()
    | st.text()
    | st.lists(st.integers())
    | st.dictionaries(
        st.sampled_from(["format", "version", "shards"]),
        st.integers(0, 3) | st.lists(st.lists(st.integers() | st.text(max_size=4), max_size=7)),
    )
)
def test_nonsense_is_a_value_error(wire: Any) -> None:
    with pytest.raises(ValueError, match="shard"):
        ShardMap.from_wire(wire)


@given(NODES, st.integers(1, 64), st.integers(1, 5))
def test_the_first_map_of_a_cluster_is_even(
    nodes: list[str], shards: int, replication: int
) -> None:
    first = ShardMap.initial(nodes, shards, replication)
    assert first.version == 1
    assert len(first.shards) == shards
    sizes = [shard.slot_end - shard.slot_start for shard in first.shards.values()]
    assert max(sizes) - min(sizes) <= 1
    for shard in first.shards.values():
        assert len(shard.members) == min(replication, len(nodes))
        assert shard.preferred_leader in shard.members
    assert first.nodes() <= set(nodes)
    by_node = [shard.id for node in nodes for shard in first.shards_of_node(node)]
    assert len(by_node) == shards * min(replication, len(nodes))


def test_an_owner_is_found_by_its_slot() -> None:
    first = ShardMap.initial(["n1", "n2", "n3"])
    assert first.shard_of("acme", "ana") == first.shard_of_slot(slot_of("acme", "ana"))
    for slot in (-1, SLOTS):
        with pytest.raises(ValueError, match="slot"):
            first.shard_of_slot(slot)


def info(name: str, start: int, end: int, **changes: Any) -> ShardInfo:
    values: dict[str, Any] = {"epoch": 1, "members": ("a", "b"), "preferred_leader": "a"}
    return ShardInfo(name, slot_start=start, slot_end=end, **(values | changes))


@pytest.mark.parametrize(
    ("ranges", "what"),
    [
        ([(0, 100), (200, SLOTS)], "no shard has slot 100"),
        ([(0, 300), (200, SLOTS)], "two shards have slot 200"),
        ([(0, 300)], "no shard has slot 300"),
        ([(5, SLOTS)], "no shard has slot 0"),
        ([(0, SLOTS), (0, SLOTS)], "two shards have slot 0"),
        ([], "no shard has slot 0"),
    ],
)
def test_gaps_and_overlaps_are_named(ranges: list[tuple[int, int]], what: str) -> None:
    shards = {f"s{i:02d}": info(f"s{i:02d}", *r) for i, r in enumerate(ranges)}
    with pytest.raises(ValueError, match=what):
        ShardMap(1, shards)


@pytest.mark.parametrize(
    "changes",
    [
        {"members": ()},
        {"members": ("b", "a")},
        {"members": ("a", "a")},
        {"members": ["a", "b"]},
        {"members": ("a", 7)},
        {"preferred_leader": "c"},
        {"epoch": 0},
        {"epoch": True},
        {"epoch": 1 << 63},
    ],
)
def test_a_shard_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shard s00"):
        info("s00", 0, SLOTS, **changes)
    with pytest.raises(ValueError, match="s00 to s99999"):
        info("meta", 0, SLOTS)
