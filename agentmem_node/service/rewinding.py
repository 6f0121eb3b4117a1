"""The whole cluster taken back to a backup, or to a moment: every shard's next epoch begins there.

The same mechanism as a move (`agentmem_cluster.epochs`), but that the new replicas are fetched out
of the backup, each member for itself, instead of copied from the old ones. What was written since
is not in them; the digests are those of the moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from agentmem_cluster.errors import AgentMemError
from agentmem_node.backup.catalog import load
from agentmem_node.backup.errors import RestoreImpossible
from agentmem_node.backup.fetch import fetch_shard, plan
from agentmem_node.backup.objects import open_store
from agentmem_node.backup.origin import Origin, encode
from agentmem_node.backup.upload import Progress
from agentmem_node.model.times import format_ms
from agentmem_node.service.stored_operations import StoredStep
from agentmem_node.service.view import View


class _Shown(Progress):
    """A fetch's progress, told to the copy that it is."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        super().__init__()
        self._tell = tell

    def check(self) -> None:
        super().check()
        self._tell(self.done_bytes, self.total_bytes)


class Source(msgspec.Struct, frozen=True):
    """Where a change of epoch takes its state from, as `Change.source` keeps it. `upto`: the last
    entry that was archived when it was planned: what comes later counts for no member."""

    url: str
    backup: str
    until_ms: int | None = None
    upto: int | None = None


async def rewind_steps(
    view: View, url: str, backup_id: str | None, until_ms: int | None
) -> list[StoredStep]:
    """One step a shard. Raises BackupMissing, BackupDamaged, BackupUnreachable,
    RestoreImpossible."""
    found = await asyncio.to_thread(
        lambda: plan(
            open_store(url), backup_id=backup_id, until_ms=until_ms, cluster_id=view.cluster_id
        )
    )
    if found.faults:
        raise RestoreImpossible(
            f"That moment cannot be restored: {'; '.join(found.faults[:3])}.",
            hint="Choose a moment that the backups and the archived log cover.",
        )
    manifest = found.manifest
    theirs, ours = manifest.model, view.model
    if (theirs.name, theirs.dim, theirs.model_hash) != (ours.name, ours.dim, ours.model_hash):
        raise RestoreImpossible(
            f"Backup {manifest.id} has vectors of {theirs.name}, this cluster of {ours.name}.",
            hint="Restore into a cluster with the same [embedding].",
        )
    then = {s.id: (s.slot_start, s.slot_end) for s in manifest.shard_map.shards.values()}
    now = {s.id: (s.slot_start, s.slot_end) for s in view.map.shards.values()}
    if then != now:
        raise RestoreImpossible(
            f"Backup {manifest.id} has {len(then)} shards, and this cluster has {len(now)}, or "
            "others: a shard cannot become another's.",
            hint="`agentmem backup restore --everything` writes the memories of any backup into "
            "an empty cluster of any size.",
        )
    upto = {s.id: s.end for s in found.shards} if until_ms is not None else {}
    moment = format_ms(manifest.at_ms if until_ms is None else until_ms)
    return [
        StoredStep(
            shard=info.id,
            members=list(info.members),
            preferred=info.preferred_leader,
            reason=f"back to {moment}",
            source=msgspec.json.encode(
                Source(url, manifest.id, until_ms, upto.get(info.id))
            ).decode(),
        )
        for info in view.map.shards.values()
    ]


def origin_entry(source: str, epoch: int, digest: bytes, at_ms: int) -> bytes:
    """What the log of an epoch says first when its state came from `source`. Raises as `fetch`."""
    wanted = _source(source)
    # After what it holds, whatever this clock says: else it would be its own origin.
    at_ms = max(at_ms, 1 + (wanted.until_ms or 0))
    return encode(Origin(epoch, wanted.backup, wanted.until_ms, wanted.upto, at_ms, digest))


def fetch(source: str, shard: str, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Make `folder` the shard as the source has it. Blocks. Raises AgentMemError, OSError."""
    wanted = _source(source)
    store = open_store(wanted.url)
    manifest = load(store, wanted.backup)
    fetch_shard(
        store,
        manifest,
        shard,
        folder,
        until_ms=wanted.until_ms,
        upto=wanted.upto,
        progress=_Shown(progress),
    )


def _source(source: str) -> Source:
    try:
        return msgspec.json.decode(source, type=Source)
    except msgspec.DecodeError as error:
        raise AgentMemError(f"{source[:200]!r} is not where a shard can be had: {error}") from error
