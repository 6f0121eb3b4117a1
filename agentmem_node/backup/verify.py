"""Reading everything that is kept, and saying what is not as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Final

import msgspec

from agentmem_node.backup import archive as log
from agentmem_node.backup import manifest as mf
from agentmem_node.backup.catalog import listed, load
from agentmem_node.backup.chunks import Chunks, chunk_name
from agentmem_node.backup.errors import BackupDamaged, BackupMissing
from agentmem_node.backup.objects import ObjectStore

_AT_ONCE: Final = 8

Told = Callable[[int, int], None]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """`backups`: those that cannot be restored because of it. Empty: the archived log suffers."""

    object: str
    what: str
    backups: list[str]


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    backups: int
    chunks: int
    segments: int
    faults: list[Fault]
    gaps: list[str]

    @property
    def is_good(self) -> bool:
        return not self.faults


def verify(
    store: ObjectStore,
    *,
    backup_id: str | None = None,
    told: Told = lambda done, total: None,
) -> Verified:
    """Read every object of one backup, or of all and of the archived log, and check it.

    `told` learns how many objects of how many are done. Raises BackupMissing for a backup that is
    not there, BackupUnreachable; what is damaged is in the answer.
    """
    faults: list[Fault] = []
    manifests = []
    if backup_id is not None:
        try:
            manifests = [load(store, backup_id)]
        except BackupDamaged as error:
            name = mf.manifest_name(backup_id)
            faults.append(Fault(object=name, what=error.message, backups=[backup_id]))
    else:
        for item in listed(store):
            if item.manifest is not None:
                manifests.append(item.manifest)
            else:
                name = mf.manifest_name(item.id)
                faults.append(Fault(object=name, what=item.fault, backups=[item.id]))
    users: dict[bytes, list[str]] = {}
    for manifest in manifests:
        for digest in {digest for shard in manifest.shards for digest in shard.hashes}:
            users.setdefault(digest, []).append(manifest.id)
    segments, marks = ([], []) if backup_id is not None else _log_of(store)
    total = len(users) + len(segments) + len(marks)
    chunks = Chunks(store)
    archives = {s.cluster_id: log.Archive(store, s.cluster_id) for s in (*segments, *marks)}

    def checks() -> Iterator[tuple[str, list[str], Callable[[], object]]]:
        for digest, backups in users.items():
            yield chunk_name(digest), backups, partial(chunks.get, digest)
        for segment in segments:
            archive = archives[segment.cluster_id]
            yield segment.name, [], partial(archive.read, segment)
        for mark in marks:
            archive = archives[mark.cluster_id]
            name = f"{log.REACHED_PREFIX}{mark.cluster_id}/{mark.shard}.json"
            yield name, [], partial(archive.reached, mark.shard)

    for done, fault in enumerate(_run(checks()), 1):
        if fault is not None:
            faults.append(fault)
        told(done, total)
    faults.sort(key=lambda fault: fault.object)
    return Verified(
        backups=len(manifests),
        chunks=len(users),
        segments=len(segments),
        faults=faults,
        gaps=list(_gaps(archives, segments, manifests)),
    )


def _log_of(store: ObjectStore) -> tuple[list[log.Segment], list[log.Segment]]:
    """The segments, and for each shard with a mark of how far it is a stand-in for it."""
    found = (log.Segment.of_name(item.name) for item in store.list(log.PREFIX))
    segments = [segment for segment in found if segment is not None]
    marks = []
    for item in store.list(log.REACHED_PREFIX):
        cluster, _, name = item.name[len(log.REACHED_PREFIX) :].partition("/")
        marks.append(log.Segment(cluster, name.removesuffix(".json"), 1, 1, 1))
    return segments, marks


def _gaps(
    archives: Mapping[str, log.Archive], segments: list[log.Segment], manifests: list[mf.Manifest]
) -> Iterator[str]:
    """Moments that cannot be restored, although the log before and after them is there."""
    by_shard: dict[tuple[str, str], list[log.Segment]] = {}
    for segment in segments:
        by_shard.setdefault((segment.cluster_id, segment.shard), []).append(segment)
    for (cluster, shard), parts in sorted(by_shard.items()):
        own = [m for m in manifests if m.cluster_id == cluster]
        indexes = [s.applied_index for m in own for s in m.shards if s.id == shard]
        oldest = min(part.first for part in parts) - 1
        if indexes and len(indexes) == len(own):  # else a split made it since the oldest of them
            oldest = min(indexes)
        for gap in log.gaps(parts, oldest):
            try:
                if archives[cluster].is_rewind(shard, gap):
                    continue
            except (BackupDamaged, BackupMissing):
                pass  # a fault of its own, by name
            yield f"{cluster}/{shard}: entries {gap.first} to {gap.last}"


def _run(
    checks: Iterator[tuple[str, list[str], Callable[[], object]]],
) -> Iterator[Fault | None]:
    """The fault of each check, in any order; a few at once, because stores answer slowly."""

    def one(name: str, backups: list[str], check: Callable[[], object]) -> Fault | None:
        try:
            check()
        except (BackupDamaged, BackupMissing) as error:
            return Fault(object=name, what=error.message, backups=backups)
        return None

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="verify") as pool:
        running: set[Future[Fault | None]] = set()
        try:
            for name, backups, check in checks:
                running.add(pool.submit(one, name, backups, check))
                if len(running) >= 2 * _AT_ONCE:
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in ended)
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
        finally:
            for future in running:
                future.cancel()
