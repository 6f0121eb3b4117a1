"""Zones: a shard's replicas are spread as evenly as zones allow, and loads follow from that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.ring import assign
from agentmem_cluster.zones import fair_shares, load_bounds, zone_ranges

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def cluster(sizes: Iterable[int]) -> dict[str, str]:
    """Nodes by zone: `sizes` of them in each."""
    return {f"n{z}{i}": f"z{z}" for z, size in enumerate(sizes) for i in range(size)}


def most_even(zone_of: Mapping[str, str], copies: int) -> list[int]:
    """What a shard's zones should have, fullest first: one by one, where there are fewest."""
    left, got = Counter(zone_of.values()), Counter(dict.fromkeys(zone_of.values(), 0))
    for _ in range(copies):
        zone = min((z for z in left if left[z]), key=lambda z: (got[z], z))
        left[zone] -= 1
        got[zone] += 1
    return sorted(got.values(), reverse=True)


def spread(members: Iterable[str], zone_of: Mapping[str, str]) -> list[int]:
    count = Counter(dict.fromkeys(zone_of.values(), 0))
    count.update(zone_of[node] for node in members)
    return sorted(count.values(), reverse=True)


@given(SIZES, st.integers(1, 40), st.integers(1, 7))
def test_replicas_are_spread_over_zones_as_evenly_as_their_sizes_allow(
    sizes: list[int], shards: int, replication: int
) -> None:
    zone_of = cluster(sizes)
    names = [f"s{i:02d}" for i in range(shards)]
    placed = assign(names, list(zone_of), replication, zones=zone_of)
    copies = min(replication, len(zone_of))
    for members in placed.values():
        assert len(set(members)) == len(members) == copies
        assert spread(members, zone_of) == most_even(zone_of, copies)


@given(SIZES, st.integers(1, 40), st.integers(1, 7))
def test_loads_are_as_bounded_as_the_spread_allows(
    sizes: list[int], shards: int, replication: int
) -> None:
    zone_of = cluster(sizes)
    names = [f"s{i:02d}" for i in range(shards)]
    placed = assign(names, list(zone_of), replication, zones=zone_of)
    count = Counter(node for members in placed.values() for node in members)
    shares = fair_shares(zone_of, shards, min(replication, len(zone_of)))
    for node, share in shares.items():
        least, most = load_bounds(share)
        assert least <= count[node] <= most


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 7))
def test_zones_of_one_size_leave_the_bound_at_a_quarter_above_the_mean(
    zones: int, size: int, shards: int, replication: int
) -> None:
    zone_of = cluster([size] * zones)
    names = [f"s{i:02d}" for i in range(shards)]
    placed = assign(names, list(zone_of), replication, zones=zone_of)
    count = Counter(node for members in placed.values() for node in members)
    mean = shards * min(replication, len(zone_of)) / len(zone_of)
    assert max(count.values()) <= math.ceil(1.25 * mean)


@given(SIZES, st.integers(1, 100), st.integers(1, 7))
def test_fair_shares_make_the_whole_and_no_zone_has_more_than_it_may(
    sizes: list[int], shards: int, replication: int
) -> None:
    zone_of = cluster(sizes)
    copies = min(replication, len(zone_of))
    shares = fair_shares(zone_of, shards, copies)
    assert sum(shares.values()) == pytest.approx(shards * copies)
    total: Counter[str] = Counter()
    for node, share in shares.items():
        total[zone_of[node]] += share  # type: ignore[assignment]
    ranges = zone_ranges(zone_of, copies)
    for zone, have in total.items():
        low, high = ranges[zone].least * shards, ranges[zone].most * shards
        assert low - 1e-6 <= have <= high + 1e-6
    # No node could be relieved by one of another zone that carries less.
    for a, b in ((a, b) for a in shares for b in shares if shares[a] > shares[b] + 1e-6):
        may_leave = total[zone_of[a]] > ranges[zone_of[a]].least * shards + 1e-6
        may_enter = total[zone_of[b]] < ranges[zone_of[b]].most * shards - 1e-6
        assert zone_of[a] != zone_of[b] and not (may_leave and may_enter)


@given(SIZES, st.integers(1, 40), st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter_with_zones_either(
    sizes: list[int], shards: int, replication: int, chance: object
) -> None:
    zone_of = cluster(sizes)
    names = [f"s{i:02d}" for i in range(shards)]
    first = assign(names, list(zone_of), replication, zones=zone_of)
    items, others = list(zone_of.items()), list(names)
    chance.shuffle(items)  # type: ignore[attr-defined]
    chance.shuffle(others)  # type: ignore[attr-defined]
    again = assign(others, [n for n, _ in items], replication, zones=dict(items))
    assert again == first


@given(SIZES, st.integers(1, 40), st.integers(1, 7))
def test_what_is_well_placed_stays(sizes: list[int], shards: int, replication: int) -> None:
    zone_of = cluster(sizes)
    names = [f"s{i:02d}" for i in range(shards)]
    placed = assign(names, list(zone_of), replication, zones=zone_of)
    assert assign(names, list(zone_of), replication, zones=zone_of, current=placed) == placed


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5))
def test_one_zone_is_as_good_as_none(nodes: int, shards: int, replication: int) -> None:
    names, members = [f"s{i:02d}" for i in range(shards)], [f"n{i}" for i in range(nodes)]
    zoned = assign(names, members, replication, zones=dict.fromkeys(members, "here"))
    assert zoned == assign(names, members, replication)


def test_a_node_alone_in_one_of_three_zones_has_a_replica_of_every_shard() -> None:
    zone_of = cluster([1, 3, 4])
    names = [f"s{i:02d}" for i in range(16)]
    placed = assign(names, list(zone_of), 3, zones=zone_of)
    assert all("n00" in members for members in placed.values())


def test_nodes_without_a_label_are_one_zone() -> None:
    nodes = ["n1", "n2", "n3", "n4"]
    placed = assign(["s00", "s01", "s02"], nodes, 2, zones={"n1": "z1", "n2": ""})
    assert all("n1" in members for members in placed.values())
