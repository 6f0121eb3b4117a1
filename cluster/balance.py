"""Working out who holds which replica: bounded loads, spread over zones, few moves.

The question is a flow: each shard sends `copies` units through zones to nodes, and zones and
nodes have bounds. A replica goes to the first node of the shard's walk along the ring that has
room; where none has, a chain of moves makes room (an augmenting path of that flow), so that a
placement within all bounds is found whenever there is one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from agentmem_cluster.zones import LOAD, fair_shares, fits, load_bounds, zone_ranges

VIRTUAL_NODES = 64


class Move(NamedTuple):
    """`taker` gets a replica of `shard` from `giver`, or a new one when that is None."""

    shard: str
    giver: str | None
    taker: str


def _point(*parts: str) -> int:
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


class Ring:
    def __init__(self, names: Iterable[str], virtual_nodes: int = VIRTUAL_NODES) -> None:
        points = sorted(
            (_point("node", name, str(i)), name) for name in names for i in range(virtual_nodes)
        )
        self._at = [point for point, _ in points]
        self._name = [name for _, name in points]
        self._walks: dict[str, list[str]] = {}
        self._ranks: dict[str, dict[str, int]] = {}

    def walk(self, shard: str) -> list[str]:
        """Every node once, in the order in which the ring offers them to the shard."""
        if shard not in self._walks:
            start = bisect_right(self._at, _point("shard", shard))
            self._walks[shard] = list(dict.fromkeys(self._name[start:] + self._name[:start]))
        return self._walks[shard]

    def rank(self, shard: str) -> dict[str, int]:
        """The place of each node in the shard's walk."""
        if shard not in self._ranks:
            self._ranks[shard] = {node: i for i, node in enumerate(self.walk(shard))}
        return self._ranks[shard]


class Placement:
    """Who holds what while it is being worked out. `held` and `members` are the answer.

    A replica given by `keep` stands on its node already: to move it costs a copy.
    """

    def __init__(
        self,
        ring: Ring,
        zone_of: Mapping[str, str],
        shards: int,
        copies: int,
        *,
        load: float = LOAD,
    ) -> None:
        self._ring = ring
        self._zone_of = zone_of
        self._copies = copies
        self._ranges = zone_ranges(zone_of, copies)
        shares = fair_shares(zone_of, shards, copies)
        self._share = shares
        self._bounds = {node: load_bounds(share, load) for node, share in shares.items()}
        self._standing: set[tuple[str, str]] = set()
        self._known: set[str] = set()  # nodes that had a replica when this began
        self.held: dict[str, set[str]] = {node: set() for node in zone_of}
        self.members: dict[str, set[str]] = {}

    def keep(self, shard: str, nodes: Sequence[str], *, trim: bool = True) -> None:
        """The shard has these already; with `trim`, only as far as zones and copies allow."""
        self.members[shard] = set()
        for node in nodes:
            zones = [self._zone_of[n] for n in (*self.members[shard], node)]
            full = len(zones) > self._copies or not fits(zones, self._ranges, self._copies)
            self._known.add(node)
            if not (trim and full):
                self._add(shard, node)
                self._standing.add((shard, node))

    def fill(self, shard: str, copies: int, *, takers: Collection[str] | None = None) -> None:
        """Give the shard the nodes that it lacks, moving standing replicas only if there is no
        other way. With `takers` no standing one moves at all, and only these nodes take any:
        where they are full, the emptiest takes more than its bound. Stops when none is left.
        """
        while len(self.members[shard]) < copies:
            room = {node for node in self.held if self._has_room(node)}
            chain = self._chain(shard, None, room, standing=False, takers=takers)
            if not chain and takers is None:
                chain = self._chain(shard, None, room, standing=True)
            if not chain:
                outside = set(self.held if takers is None else takers) - self.members[shard]
                open_zones = self._open_zones(shard, outside)
                able = [n for n in outside if self._zone_of[n] in open_zones]
                if not able:
                    return
                chain = [Move(shard, None, min(able, key=lambda n: (*self._fullness(n), n)))]
            self._apply(chain)

    def level(self) -> None:
        """Move replicas until every node is within its bounds, no further."""
        while True:
            nodes = sorted(self.held, key=lambda n: (*self._fullness(n), n))
            over = [n for n in reversed(nodes) if len(self.held[n]) > self._bounds[n][1]]
            under = [n for n in nodes if len(self.held[n]) < self._bounds[n][0]]
            if over:
                # A node that is new gets what others have too much: old ones exchange nothing.
                able = [n for n in nodes if self._has_room(n)]
                givers, takers = over, sorted(able, key=lambda n: n in self._known)
            elif under:
                able = [n for n in reversed(nodes) if len(self.held[n]) > self._bounds[n][0]]
                givers, takers = able, under
            else:
                return
            chain = self._first_chain(givers, takers)
            if not chain:
                return
            self._apply(chain)

    # -- chains of moves ----------------------------------------------------------------

    def _first_chain(self, givers: Sequence[str], takers: Sequence[str]) -> list[Move]:
        for giver in givers:
            for taker in takers:
                if giver != taker and (direct := self._direct(giver, taker)):
                    return [direct]
        for giver in givers:
            for taker in takers:
                if chain := self._chain(None, giver, {taker}, standing=True):
                    return chain
        return []

    def _direct(self, giver: str, taker: str) -> Move | None:
        """The replica of `giver` that the ring would rather give `taker`, if zones allow one."""
        leaves, enters = self._zone_of[giver], self._zone_of[taker]
        able = [
            s
            for s in self.held[giver] - self.held[taker]
            if leaves == enters or (self._may_leave(s, leaves) and self._may_enter(s, enters))
        ]
        if not able:
            return None

        def cost(shard: str) -> tuple[bool, int, str]:
            rank = self._ring.rank(shard)
            return (shard, giver) in self._standing, rank[taker] - rank[giver], shard

        return Move(min(able, key=cost), giver, taker)

    def _chain(
        self,
        shard: str | None,
        giver: str | None,
        goals: Collection[str],
        *,
        standing: bool,
        takers: Collection[str] | None = None,
    ) -> list[Move]:
        """The shortest chain of moves that ends at a goal: `shard` lacks a replica, or `giver`
        has one too many. Each move's taker is the next one's giver. Empty when there is none.
        """
        came_by: dict[str, Move] = {}
        queue: list[str] = []
        done: set[tuple[str, str]] = set()  # shard, zone: offered from there once

        def offer(shard: str, source: str | None) -> str | None:
            zones: set[str] = set()
            if source is None:
                outside = set(self.held if takers is None else takers) - self.members[shard]
                zones = self._open_zones(shard, outside)
            else:
                home = self._zone_of[source]
                if (shard, home) in done:
                    return None
                done.add((shard, home))
                zones = {home}
                if self._may_leave(shard, home):
                    zones.update(z for z in self._ranges if self._may_enter(shard, z))
            for node in self._ring.walk(shard):
                if (
                    node not in came_by
                    and node != giver
                    and node not in self.members[shard]
                    and self._zone_of.get(node) in zones
                    and (takers is None or node in takers)
                ):
                    came_by[node] = Move(shard, source, node)
                    queue.append(node)
                    if node in goals:
                        return node
            return None

        def walk_back(node: str | None) -> list[Move]:
            chain = []
            while node is not None and node != giver:
                chain.append(came_by[node])
                node = chain[-1].giver
            return chain[::-1]

        if shard is not None and (end := offer(shard, None)):
            return walk_back(end)
        at = 0
        if giver is not None:
            queue.append(giver)
        while at < len(queue):
            node = queue[at]
            at += 1
            for mine in sorted(self.held[node]):
                if not standing and (mine, node) in self._standing:
                    continue
                if end := offer(mine, node):
                    return walk_back(end)
        return []

    def _apply(self, chain: Iterable[Move]) -> None:
        chain = list(chain)
        for move in chain:
            if move.giver is not None:
                self.held[move.giver].remove(move.shard)
                self.members[move.shard].remove(move.giver)
        for move in chain:
            self._add(move.shard, move.taker)

    def _add(self, shard: str, node: str) -> None:
        self.held[node].add(shard)
        self.members[shard].add(node)

    # -- zones and loads ----------------------------------------------------------------

    def _count(self, shard: str) -> Counter[str]:
        return Counter(self._zone_of[node] for node in self.members[shard])

    def _may_leave(self, shard: str, zone: str) -> bool:
        return self._count(shard)[zone] > self._ranges[zone].least

    def _may_enter(self, shard: str, zone: str) -> bool:
        return self._count(shard)[zone] < self._ranges[zone].most

    def _open_zones(self, shard: str, outside: Iterable[str]) -> set[str]:
        """Where the next replica goes: the zones with the fewest, of those that have a node."""
        count = self._count(shard)
        zones = {self._zone_of[node] for node in outside}
        fewest = min((count[zone] for zone in zones), default=0)
        return {zone for zone in zones if count[zone] == fewest}

    def _has_room(self, node: str) -> bool:
        return len(self.held[node]) < self._bounds[node][1]

    def _fullness(self, node: str) -> tuple[float, int]:
        return len(self.held[node]) - self._share[node], len(self.held[node])
