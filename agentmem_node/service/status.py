"""What a node says about itself and its cluster: `GET /cluster`, readiness, metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import GroupStatus, Role
from agentmem_cluster.raft.host import Host
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config import Config
from agentmem_node.observe.snapshot import (
    CacheSnapshot,
    EmbeddingSnapshot,
    GroupSnapshot,
    JournalSnapshot,
    NodeSnapshot,
    PeerSnapshot,
    RaftRole,
    ShardSnapshot,
)
from agentmem_node.providers.base import EmbeddingProvider
from agentmem_node.service.membership import Membership
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.routing import Routing

_ROLES: dict[Role, RaftRole] = {
    Role.LEADER: "leader",
    Role.FOLLOWER: "follower",
    Role.CANDIDATE: "candidate",
}
# A replica that is this far behind still answers correctly, only later: reads wait for it.
_READY_LAG_MAX = 1_000


def _version() -> str:
    try:
        return version("agentmem-cluster")
    except PackageNotFoundError:
        return "unknown"


class Status:
    VERSION: ClassVar[str] = _version()

    def __init__(
        self,
        config: Config,
        routing: Routing,
        membership: Membership,
        replicas: Replicas,
        host: Host,
        journal: Journal,
        link: Link | None,
    ) -> None:
        self._config = config
        self._routing = routing
        self._membership = membership
        self._replicas = replicas
        self._host = host
        self._journal = journal
        self._link = link
        # How much others have stored is not for every tenant to read.
        self._is_shared = len({key.tenant for key in config.security.api_keys}) > 1
        self.disk_free_bytes = 0
        self.disk_is_full = False

    # -- GET /cluster ---------------------------------------------------------------------

    def cluster_view(self) -> dict[str, Any]:
        """Raises Unavailable while the shard map is not known."""
        view = self._membership.require_view()
        nodes = {}
        placed = set(view.map.nodes())
        for name in sorted({*placed, *view.nodes}):
            state = view.states.get(name, "active")
            if state == "removed" and name not in placed:
                continue
            known = view.nodes.get(name)
            configured = self._config.cluster.nodes.get(name)
            url = configured.http if configured is not None else ""
            nodes[name] = {
                "http": url if known is None else known.http,
                "up": self._routing.is_connected(name),
                "version": None if known is None else known.version,
                # What it understands; changes of shards wait until all nodes understand them.
                "level": None if known is None else known.level,
                "state": state,
                "zone": "" if known is None else known.zone,
            }
        shards = {}
        for shard_id, info in view.map.shards.items():
            shard: dict[str, Any] = {
                "epoch": info.epoch,
                "members": list(info.members),
                "leader": self._routing.leader_of(shard_id),
                "preferred_leader": info.preferred_leader,
                "slots": [[info.slot_start, info.slot_end - 1]],
            }
            local = self._routing.local.get(shard_id)
            if local is not None:
                status = local.group.status()
                shard |= {
                    "term": status.term,
                    "commit_index": status.commit_index,
                    "applied": {self._config.node.id: status.applied_index},
                    "lag": max(0, status.commit_index - status.applied_index),
                    # The state's own count: the group's is of another moment.
                    "digest_index": local.shard.applied_index,
                    "digest": local.shard.digest().hex(),
                }
                if not self._is_shared:
                    shard["memories"] = local.shard.count()
            shards[shard_id] = shard
        return {
            "name": self._config.cluster.name,
            "cluster_id": view.cluster_id,
            "node": self._config.node.id,
            "version": view.map.version,
            "model": {"name": view.model.name, "dim": view.model.dim},
            "meta": self._membership.meta_status(),
            "nodes": nodes,
            "shards": shards,
        }

    # -- readiness ------------------------------------------------------------------------

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Ready: the map is known, and every local group has a leader and has caught up."""
        reasons: dict[str, Any] = {}
        is_member = self._membership.view is not None and self._membership.is_admitted
        if self._membership.view is None:
            reasons["shard_map"] = "not known yet"
        elif not is_member:
            reasons["admission"] = "the cluster does not know this node yet"
        leaderless, behind, lost = [], [], []
        for group_id, group in self._host.groups.items():
            status = group.status()
            if status.needs_reseed:
                lost.append(group_id)  # other replicas answer for it
            elif status.leader is None:
                leaderless.append(group_id)
            elif status.commit_index - status.applied_index > _READY_LAG_MAX:
                behind.append(group_id)
        if leaderless:
            reasons["without_leader"] = leaderless
        if behind:
            reasons["catching_up"] = behind
        if lost:
            reasons["replica_needs_reseed"] = lost
        view = self._membership.view
        missing = [] if view is None else self._missing(view.map)
        if missing:
            reasons["replica_missing"] = missing
        if self._replicas.damaged:
            reasons["replica_damaged"] = sorted(self._replicas.damaged)
        if self.disk_is_full:
            reasons["disk"] = "almost full: writes are refused, reads are served"
        return is_member and not (leaderless or behind), reasons

    def _missing(self, shard_map: ShardMap) -> list[str]:
        """Shards that count on this node, which has no replica of them: it lost it, or copies it.

        The others have the quorum, and this node serves its other shards, so it stays ready; who
        restarts nodes one by one waits until this is gone.
        """
        return sorted(
            shard
            for shard, info in shard_map.shards.items()
            if self._config.node.id in info.members and shard not in self._routing.local
        )

    # -- metrics --------------------------------------------------------------------------

    def snapshot(self, embedder: EmbeddingProvider | None) -> NodeSnapshot:
        shard_map = self._routing.map
        return NodeSnapshot(
            node_id=self._config.node.id,
            version=self.VERSION,
            map_version=0 if shard_map is None else shard_map.version,
            disk_free_bytes=self.disk_free_bytes,
            disk_is_full=self.disk_is_full,
            groups=[_group(group.status()) for group in self._host.groups.values()],
            shards=[self._shard(shard_id) for shard_id in self._routing.local],
            journal=self._journal_snapshot(),
            peers=self._peers(),
            caches=_caches(embedder),
            embedding=_embedding(embedder),
        )

    def _shard(self, shard_id: str) -> ShardSnapshot:
        local = self._routing.local[shard_id]
        stored = local.shard.stats()
        index = local.shard.index.stats() if local.shard.index is not None else {}
        return ShardSnapshot(
            name=shard_id,
            memories=local.shard.count(),
            record_bytes=stored.get("bytes", 0),
            vectors=stored.get("vectors", 0),
            index_blocks=index.get("blocks", 0),
            index_bytes=index.get("bytes", 0),
            text_documents=index.get("text_documents", 0),
            text_tail=index.get("text_tail", 0),
        )

    def _journal_snapshot(self) -> JournalSnapshot:
        stats = self._journal.stats()
        return JournalSnapshot(
            size_bytes=stats.size_bytes,
            segments=stats.segments,
            written_bytes=stats.written_bytes,
            syncs=stats.syncs,
            sync_seconds=stats.sync_seconds,
            sync_seconds_max=stats.sync_seconds_max,
        )

    def _peers(self) -> list[PeerSnapshot]:
        if self._link is None:
            return []
        return [
            PeerSnapshot(
                name=peer.name,
                connected=peer.connected,
                sent_bytes=peer.sent_bytes,
                received_bytes=peer.received_bytes,
                queued_bytes=peer.queued_bytes,
            )
            for peer in self._link.stats()
        ]


def _group(status: GroupStatus) -> GroupSnapshot:
    return GroupSnapshot(
        name=status.id,
        role=_ROLES[status.role],
        term=status.term,
        has_leader=status.leader is not None,
        commit_index=status.commit_index,
        applied_index=status.applied_index,
        durable_index=status.durable_index,
        queued_writes=status.queued,
    )


def _caches(embedder: EmbeddingProvider | None) -> list[CacheSnapshot]:
    if embedder is None:
        return []
    stats = embedder.stats()
    return [CacheSnapshot(name="embedding", hits=stats["cache_hits"], misses=stats["texts"])]


def _embedding(embedder: EmbeddingProvider | None) -> EmbeddingSnapshot:
    if embedder is None:
        return EmbeddingSnapshot()
    stats = embedder.stats()
    return EmbeddingSnapshot(
        texts=stats["texts"],
        seconds=stats["busy_us"] / 1e6,
        queued_texts=stats["queued_texts"],
    )
