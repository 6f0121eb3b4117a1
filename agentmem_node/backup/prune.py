"""Removing old backups, and what only they needed.

A backup that the cluster was taken back to is kept as long as one from before that is: moments
after it begin there.

Manifests go first: from then on a chunk that nobody names is garbage, whether this run removes it
or, after an interruption, the next. The archived log is kept from the oldest backup that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from agentmem_node.backup import archive as log
from agentmem_node.backup import chunks
from agentmem_node.backup import manifest as mf
from agentmem_node.backup.catalog import NOTICE_S, Notice, listed
from agentmem_node.backup.errors import BackupDamaged
from agentmem_node.backup.objects import ObjectStore

# A chunk that nobody names may be one of a backup that was interrupted and will be run again.
GRACE_MS: Final = 24 * 3_600_000


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """`kept` and `removed` are ids of backups, oldest first."""

    kept: list[str]
    removed: list[str]
    chunks: int
    segments: int
    freed_bytes: int


def prune(
    store: ObjectStore,
    keep: int,
    *,
    now_ms: Callable[[], int],
    token: str,
    grace_ms: int = GRACE_MS,
    told: Callable[[int], None] = lambda removed: None,
) -> Pruned:
    """Keep the newest `keep` backups of each cluster, and what they need.

    `token` makes this run's notice its own. Raises BackupBusy while a backup is being made,
    BackupDamaged when a manifest cannot be read: what it needs would be taken for garbage.
    """
    if keep < 1:
        raise ValueError("at least one backup is kept")
    notice = Notice.begin(store, "prune", token, now_ms)
    try:
        return _prune(store, keep, now_ms, grace_ms, notice, told)
    finally:
        notice.end()


def _prune(
    store: ObjectStore,
    keep: int,
    now_ms: Callable[[], int],
    grace_ms: int,
    notice: Notice,
    told: Callable[[int], None],
) -> Pruned:
    kept, old = _split(store, keep)
    for manifest in old:
        store.delete(mf.manifest_name(manifest.id))
    wanted = {
        chunks.chunk_name(digest)
        for manifest in kept
        for shard in manifest.shards
        for digest in shard.hashes
    }
    renewed_ms = before_ms = now_ms()
    before_ms -= grace_ms
    store.sweep(before_ms)
    removed = {chunks.PREFIX: 0, log.PREFIX: 0}
    freed = 0
    for prefix, name, size in _garbage(store, wanted, before_ms, kept):
        if now_ms() - renewed_ms > NOTICE_S * 1000:
            renewed_ms = now_ms()
            notice.renew(renewed_ms)
        store.delete(name)
        removed[prefix] += 1
        freed += size
        told(sum(removed.values()))
    return Pruned(
        kept=[manifest.id for manifest in kept],
        removed=[manifest.id for manifest in old],
        chunks=removed[chunks.PREFIX],
        segments=removed[log.PREFIX],
        freed_bytes=freed,
    )


def _split(store: ObjectStore, keep: int) -> tuple[list[mf.Manifest], list[mf.Manifest]]:
    by_cluster: dict[str, list[mf.Manifest]] = {}
    newest: set[str] = set()
    for item in listed(store):
        if item.manifest is None:
            raise BackupDamaged(
                f"The manifest of backup {item.id} cannot be read ({item.fault}) Nobody knows "
                "which chunks it needs, so nothing is removed.",
                hint=f"Remove the object {mf.manifest_name(item.id)} if that backup is given up.",
                object=mf.manifest_name(item.id),
            )
        by_cluster.setdefault(item.manifest.cluster_id, []).append(item.manifest)
    for manifests in by_cluster.values():
        newest |= {manifest.id for manifest in manifests[-keep:]}
    everything = [manifest for manifests in by_cluster.values() for manifest in manifests]
    needed = _needed(store, everything, newest)
    kept = [manifest for manifest in everything if manifest.id in needed]
    old = [manifest for manifest in everything if manifest.id not in needed]
    return sorted(kept, key=lambda m: m.at_ms), sorted(old, key=lambda m: m.at_ms)


def _needed(store: ObjectStore, manifests: list[mf.Manifest], kept: set[str]) -> set[str]:
    """Those, and what their clusters were taken back to since: moments after that begin there."""
    by_id = {manifest.id: manifest for manifest in manifests}
    needed: set[str] = set()
    todo = set(kept)
    while todo:
        needed |= todo
        origins = set()
        for manifest in (by_id[one] for one in todo):
            archive = log.Archive(store, manifest.cluster_id)
            for shard in manifest.shards:
                for part in archive.rewinds(shard.id, shard.epoch, legible=True):
                    assert part.origin is not None
                    origins.add(part.origin.backup)
        todo = (origins & by_id.keys()) - needed
    return needed


def _garbage(
    store: ObjectStore, wanted: set[str], before_ms: int, kept: Iterable[mf.Manifest]
) -> Iterable[tuple[str, str, int]]:
    for item in store.list(chunks.PREFIX):
        if item.name not in wanted and item.modified_ms < before_ms:
            yield chunks.PREFIX, item.name, item.size_bytes
    oldest: dict[tuple[str, str], int] = {}
    backups = Counter(manifest.cluster_id for manifest in kept)
    having = Counter((m.cluster_id, shard.id) for m in kept for shard in m.shards)
    for manifest in kept:
        for shard in manifest.shards:
            key = (manifest.cluster_id, shard.id)
            # A backup from before the split that made a shard needs its log from the beginning.
            index = shard.applied_index if having[key] == backups[manifest.cluster_id] else 0
            oldest[key] = min(oldest.get(key, index), index)
    for item in store.list(log.PREFIX):
        segment = log.Segment.of_name(item.name)
        if segment is None:
            continue
        # Of a shard that no backup has, nothing can be restored, and nothing is known either.
        if segment.last <= oldest.get((segment.cluster_id, segment.shard), 0):
            yield log.PREFIX, item.name, item.size_bytes
