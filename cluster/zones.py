"""How a shard's replicas divide over zones, and what each node should then carry.

A zone is what fails at once: a rack, a hall, a region. Nodes without a label are one zone: to
call each a zone of its own would claim a spread that nobody knows of. With one zone in all,
every rule here is empty.

Spread goes before balance. A node alone in its zone holds a replica of every shard when there
are no more zones than replicas, however many that is: fewer would leave shards which the loss
of another zone stops.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

LOAD = 1.25  # a node carries at most ceil(LOAD * its fair share), at least floor(share / LOAD)


@dataclass(frozen=True, slots=True)
class ZoneRange:
    """How many replicas of one shard a zone may have: `least` to `most`, one apart at most."""

    least: int
    most: int


def zones_of(nodes: Collection[str], zones: Mapping[str, str] | None) -> dict[str, str]:
    """The zone of each node, "" where `zones` names none."""
    return {node: (zones or {}).get(node, "") for node in nodes}


def zone_ranges(zone_of: Mapping[str, str], copies: int) -> dict[str, ZoneRange]:
    """By zone, the most even division of `copies` replicas that the zones' sizes allow.

    Zones fill level by level, like glasses of different heights: small ones are full first.
    """
    sizes = Counter(zone_of.values())

    def held(level: int) -> int:
        return sum(min(size, level) for size in sizes.values())

    level = 0
    while held(level) < copies and held(level + 1) <= copies and level < max(sizes.values()):
        level += 1
    more = 1 if held(level) < copies else 0
    return {
        zone: ZoneRange(min(size, level), min(size, level + more)) for zone, size in sizes.items()
    }


def fits(zones: Collection[str], ranges: Mapping[str, ZoneRange], copies: int) -> bool:
    """Whether replicas in these zones can be part of the most even division of `copies`."""
    count = Counter(zones)
    if any(zone not in ranges or n > ranges[zone].most for zone, n in count.items()):
        return False
    above = sum(max(0, n - ranges[zone].least) for zone, n in count.items())
    return above <= copies - sum(r.least for r in ranges.values())


def fair_shares(zone_of: Mapping[str, str], shards: int, copies: int) -> dict[str, float]:
    """By node, the mean number of replicas of its zone's nodes when shards are well spread.

    All nodes the same, `shards * copies / nodes`, unless a zone must have more or cannot take
    as many: the others then share the rest.
    """
    sizes = Counter(zone_of.values())
    ranges = zone_ranges(zone_of, copies)
    least = {z: Fraction(shards * ranges[z].least, size) for z, size in sizes.items()}
    most = {z: Fraction(shards * ranges[z].most, size) for z, size in sizes.items()}

    def placed(level: Fraction) -> Fraction:
        clamped = (sizes[z] * min(max(level, least[z]), most[z]) for z in sizes)
        return sum(clamped, Fraction(0))

    # `placed` rises in straight lines between these points: find the line that reaches the whole.
    points = sorted({*least.values(), *most.values()})
    level = max(point for point in points if placed(point) <= shards * copies)
    slope = sum(size for z, size in sizes.items() if least[z] <= level < most[z])
    if slope:
        level += (shards * copies - placed(level)) / slope
    return {node: float(min(max(level, least[z]), most[z])) for node, z in zone_of.items()}


def load_bounds(share: float, load: float = LOAD) -> tuple[int, int]:
    """The fewest and the most replicas that a node with this fair share should carry."""
    return math.floor(share / load), math.ceil(load * share)
