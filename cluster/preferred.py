"""Preferred leaders: as even as the shards' members allow, by as few changes as possible.

A flow with convex costs: each shard sends one unit to a member, a node pays for its k-th
leadership more than for the one before, and a shard a little for a leader other than it has.
A choice is the cheapest exactly when no cycle of hand-overs makes it cheaper (Klein, 1967), so
such cycles are looked for until there is none. A swap of two would get stuck where a chain
through several nodes does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

_HUB = ""  # leaderships enter and leave a chain here; no node has this id
_Arcs = dict[tuple[str, str], tuple[int, str]]  # giver, taker: the cost, the shard handed over


def even_leaders(
    members: Mapping[str, Sequence[str]],
    current: Mapping[str, str],
    *,
    may_change: Collection[str] | None = None,
) -> dict[str, str]:
    """A leader for each shard, from its members (the first is taken where all are alike).

    `current` is whom each shard prefers now. Shards that are not in `may_change`, when that is
    given, keep theirs. The sum of the squares of the nodes' leaderships is the least possible,
    and among such choices the number of changes is.
    """
    count = dict.fromkeys((n for shard in sorted(members) for n in members[shard]), 0)
    free = set(members) if may_change is None else set(may_change) & set(members)
    leads: dict[str, str] = {}
    for shard in sorted(members):
        was = current.get(shard)
        if was is not None and (was in members[shard] or shard not in free):
            leads[shard] = was
            count[was] = count.get(was, 0) + 1
    for shard in sorted(set(members) - set(leads)):
        leads[shard] = min(members[shard], key=lambda n: count[n])
        count[leads[shard]] += 1
    while cycle := _cheaper(_arcs(leads, members, current, count, free)):
        for giver, taker, shard in cycle:
            if shard:
                leads[shard] = taker
                count[giver] -= 1
                count[taker] += 1
    return leads


def _arcs(
    leads: Mapping[str, str],
    members: Mapping[str, Sequence[str]],
    current: Mapping[str, str],
    count: Mapping[str, int],
    free: Collection[str],
) -> _Arcs:
    """What each hand-over of one leadership from a node to another would cost at least."""
    uneven = len(members) + 1  # dearer than all changes together
    arcs: _Arcs = {}
    for node in sorted(count):
        arcs[_HUB, node] = (-uneven * (2 * count[node] - 1), "")
        arcs[node, _HUB] = (uneven * (2 * count[node] + 1), "")
    for shard in sorted(free):
        giver, was = leads[shard], current.get(shard)
        kept = was in members[shard]
        for taker in members[shard]:
            if taker != giver:
                cost = (taker != was) - (giver != was) if kept else 0
                arcs[giver, taker] = min(arcs.get((giver, taker), (cost, shard)), (cost, shard))
    return arcs


def _cheaper(arcs: _Arcs) -> list[tuple[str, str, str]]:
    """A cycle of arcs (giver, taker, shard) of negative cost, by Bellman-Ford; empty if none."""
    nodes = {node for arc in arcs for node in arc}
    distance = dict.fromkeys(nodes, 0)
    came_from: dict[str, str] = {}
    for _ in range(len(nodes) + 1):
        changed = False
        for (giver, taker), (cost, _) in arcs.items():
            if distance[giver] + cost < distance[taker]:
                distance[taker] = distance[giver] + cost
                came_from[taker] = giver
                changed = True
        if not changed:
            return []
        # A cycle among predecessors is a negative one: no need to wait for the last pass.
        if ring := _cycle(came_from):
            return [(giver, taker, arcs[giver, taker][1]) for giver, taker in ring]
    return []


def _cycle(came_from: Mapping[str, str]) -> list[tuple[str, str]]:
    seen: dict[str, str] = {}  # node -> the node from which it was first reached
    for start in sorted(came_from):
        node = start
        while node in came_from and node not in seen:
            seen[node] = start
            node = came_from[node]
        if seen.get(node) == start and node in came_from:
            ring: list[tuple[str, str]] = []
            end = node
            while not ring or node != end:
                ring.append((came_from[node], node))
                node = came_from[node]
            return ring
    return []
