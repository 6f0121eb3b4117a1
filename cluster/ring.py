"""Where things belong: an owner to a slot, a shard to nodes. Pure functions, the same everywhere.

A shard's replicas are found by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2016): walk the ring from the shard's point and take the first nodes that are
not full. A node that comes or goes therefore moves few replicas, and none holds more than
`ceil(load * mean)`. Two refinements for small clusters, where the plain method is uneven: no
node stays below `floor(mean / load)`, and preferred leaders differ by at most one where the
members allow it.
"""

from __future__ import annotations

import math
from binascii import crc_hqx
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from hashlib import blake2b

SLOTS = 16_384
VIRTUAL_NODES = 64


def slot_of(tenant: str, owner: str) -> int:
    """The slot, 0 to 16,383, of everything that `owner` (a scope's routing id) has in `tenant`."""
    tenant_crc = crc_hqx(tenant.encode("utf-8", "surrogatepass") + b"\0", 0)
    return crc_hqx(owner.encode("utf-8", "surrogatepass"), tenant_crc) & (SLOTS - 1)


def slot_of_id(key: bytes) -> int:
    """The slot within a memory id's 16 bytes (`agentmem_node.model.ids` says which bits).

    Of a UUID that is not ours it is an arbitrary slot, on which nothing is found.
    """
    return ((key[6] & 0x0F) << 10) | (key[7] << 2) | ((key[8] >> 4) & 0b11)


def assign(
    shards: Sequence[str],
    nodes: Sequence[str],
    replication: int,
    *,
    load: float = 1.25,
    virtual_nodes: int = VIRTUAL_NODES,
    current: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The nodes of each shard, its preferred leader first; `replication` of them, or all there are.

    The answer depends on the sets given, not on their order. `current` is an assignment that
    is in force: what it may keep it keeps, so that only replicas of lost nodes, of overfull
    nodes, and as many as an added node needs to carry its part, are moved.
    Raises ValueError when there is no node, or a name twice.
    """
    names = sorted(nodes)
    if not names:
        raise ValueError("there is no node to assign shards to")
    if len(set(names)) != len(names) or len(set(shards)) != len(shards):
        raise ValueError("a node or a shard is named twice")
    if replication < 1 or load < 1 or virtual_nodes < 1:
        raise ValueError("replication, load and virtual_nodes must be at least 1")
    copies = min(replication, len(names))
    mean = len(shards) * copies / len(names)
    placement = _Placement(_Ring(names, virtual_nodes), names, most=math.ceil(load * mean))
    ordered = sorted(shards)
    for shard in ordered:
        kept = [n for n in (current or {}).get(shard, ()) if n in placement.held]
        placement.keep(shard, kept[:copies])
    for shard in ordered:
        placement.fill(shard, copies)
    placement.level(least=math.floor(mean / load))
    leaders = _leaders(ordered, placement.ranked(ordered), names, current or {})
    return {
        shard: (leaders[shard], *(n for n in members if n != leaders[shard]))
        for shard, members in placement.ranked(ordered).items()
    }


def _point(*parts: str) -> int:
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


class _Ring:
    def __init__(self, names: Sequence[str], virtual_nodes: int) -> None:
        points = sorted(
            (_point("node", name, str(i)), name) for name in names for i in range(virtual_nodes)
        )
        self._at = [point for point, _ in points]
        self._name = [name for _, name in points]

    def walk(self, shard: str) -> list[str]:
        """Every node once, in the order in which the ring offers them to the shard."""
        start = bisect_right(self._at, _point("shard", shard))
        return list(dict.fromkeys(self._name[start:] + self._name[:start]))


class _Placement:
    """Who holds what while it is being worked out."""

    def __init__(self, ring: _Ring, names: Sequence[str], most: int) -> None:
        self._ring = ring
        self._most = most
        self._walks: dict[str, list[str]] = {}
        self.held: dict[str, set[str]] = {name: set() for name in names}
        self.members: dict[str, set[str]] = {}

    def walk(self, shard: str) -> list[str]:
        if shard not in self._walks:
            self._walks[shard] = self._ring.walk(shard)
        return self._walks[shard]

    def ranked(self, shards: Sequence[str]) -> dict[str, list[str]]:
        return {s: [n for n in self.walk(s) if n in self.members[s]] for s in shards}

    def keep(self, shard: str, nodes: Sequence[str]) -> None:
        self.members[shard] = set()
        for node in nodes:
            self._add(shard, node)

    def fill(self, shard: str, copies: int) -> None:
        """Give the shard the nodes that it lacks."""
        for node in self.walk(shard):
            if len(self.members[shard]) == copies:
                return
            if node not in self.members[shard] and len(self.held[node]) < self._most:
                self._add(shard, node)
        while len(self.members[shard]) < copies:
            # Every node with room is a member already. One that is full and not a member holds
            # more shards than one with room, so it holds one which the other can take.
            full = next(n for n in self.walk(shard) if n not in self.members[shard])
            room = min(self.held, key=lambda n: (len(self.held[n]), n))
            self._move(full, room)
            self._add(shard, full)

    def level(self, least: int) -> None:
        """Move replicas from the fullest to the emptiest until all are within bounds."""
        while True:
            low = min(self.held, key=lambda n: (len(self.held[n]), n))
            high = max(self.held, key=lambda n: (len(self.held[n]), n))
            within = len(self.held[low]) >= least and len(self.held[high]) <= self._most
            if within or len(self.held[high]) - len(self.held[low]) < 2:
                return
            self._move(high, low)

    def _move(self, source: str, target: str) -> None:
        """Hand `target` the replica of `source` that the ring would rather give it."""
        shard = min(
            self.held[source] - self.held[target],
            key=lambda s: (self.walk(s).index(target) - self.walk(s).index(source), s),
        )
        self.held[source].remove(shard)
        self.members[shard].remove(source)
        self._add(shard, target)

    def _add(self, shard: str, node: str) -> None:
        self.held[node].add(shard)
        self.members[shard].add(node)


def _leaders(
    shards: Sequence[str],
    members: Mapping[str, Sequence[str]],
    names: Sequence[str],
    current: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """A preferred leader for each shard, as even as the members allow.

    Along a chain of shards whose members overlap, leadership is handed from a node that leads
    at least two more than the node at the chain's end (an augmenting path: when there is none,
    no choice is more even). A chain reaches whole rings of nodes where a swap of two gets stuck.
    """
    leads: dict[str, str] = {}
    count = dict.fromkeys(names, 0)
    for shard in shards:
        was = current.get(shard, ())
        keeps = was[0] if was and was[0] in members[shard] else None
        leads[shard] = keeps or min(members[shard], key=lambda n: count[n])
        count[leads[shard]] += 1
    while _hand_over(leads, members, count):
        pass
    return leads


def _hand_over(
    leads: dict[str, str], members: Mapping[str, Sequence[str]], count: dict[str, int]
) -> bool:
    led: dict[str, list[str]] = {name: [] for name in count}
    for shard in sorted(leads):
        led[leads[shard]].append(shard)
    for start in sorted(count, key=lambda n: (-count[n], n)):
        came_by: dict[str, tuple[str, str]] = {}  # node -> (shard handed over, its old leader)
        queue = [start]
        for node in queue:
            if count[start] - count[node] >= 2:
                count[start] -= 1
                count[node] += 1
                while node != start:
                    shard, giver = came_by[node]
                    leads[shard] = node
                    node = giver
                return True
            for shard in led[node]:
                for taker in members[shard]:
                    if taker != start and taker not in came_by:
                        came_by[taker] = (shard, node)
                        queue.append(taker)
    return False
