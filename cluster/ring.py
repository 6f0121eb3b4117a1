"""Where things belong: an owner to a slot, a shard to nodes. Pure functions, the same everywhere.

A shard's replicas are found by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2016): walk the ring from the shard's point and take the first nodes that are
not full. A node that comes or goes therefore moves few replicas, and none holds more than
`ceil(load * mean)`. Three refinements for small clusters, where the plain method is uneven: no
node stays below `floor(mean / load)`, preferred leaders differ by at most one where the members
allow it, and a shard's replicas stand in as many zones as there are (`zones`).
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping, Sequence

from agentmem_cluster.balance import VIRTUAL_NODES, Placement, Ring
from agentmem_cluster.preferred import even_leaders
from agentmem_cluster.zones import LOAD, zones_of

SLOTS = 16_384


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
    load: float = LOAD,
    virtual_nodes: int = VIRTUAL_NODES,
    current: Mapping[str, Sequence[str]] | None = None,
    zones: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The nodes of each shard, its preferred leader first; `replication` of them, or all there are.

    The answer depends on the sets given, not on their order. `current` is an assignment that
    is in force: what it may keep it keeps, so that only replicas of lost nodes, of overfull
    nodes, and as many as an added node needs to carry its part, are moved. `zones` is the zone
    of each node that has a label: a shard's replicas are spread over zones as evenly as their
    sizes allow, before loads are. Raises ValueError when there is no node, or a name twice.
    """
    names = sorted(nodes)
    if not names:
        raise ValueError("there is no node to assign shards to")
    if len(set(names)) != len(names) or len(set(shards)) != len(shards):
        raise ValueError("a node or a shard is named twice")
    if replication < 1 or load < 1 or virtual_nodes < 1:
        raise ValueError("replication, load and virtual_nodes must be at least 1")
    copies = min(replication, len(names))
    ring = Ring(names, virtual_nodes)
    placement = Placement(ring, zones_of(names, zones), len(shards), copies, load=load)
    ordered = sorted(shards)
    was = {shard: tuple((current or {}).get(shard, ())) for shard in ordered}
    for shard in ordered:
        placement.keep(shard, [node for node in was[shard] if node in placement.held])
    for shard in ordered:
        placement.fill(shard, copies)
    placement.level()
    ranked = {s: [n for n in ring.walk(s) if n in placement.members[s]] for s in ordered}
    leaders = even_leaders(ranked, {s: was[s][0] for s in ordered if was[s]})
    return {
        shard: (leaders[shard], *(n for n in members if n != leaders[shard]))
        for shard, members in ranked.items()
    }
