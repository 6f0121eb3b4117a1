"""A shard out of a backup: at the moment of the cut, or at any later one by its archived log.

`folder` appears whole, durable and checked, or not at all. Whatever was fetched before an
interruption is used by the next attempt:

    <folder>.fetch.partial    chunks that have arrived
    <folder>.fetch            all of them; the log is being replayed
    <folder>.fetch.json       whose they are: another backup begins anew
    <folder>.fetch.origin     what the shard was taken back to, where the log begins with that
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from agentmem_cluster.errors import InternalError
from agentmem_cluster.raft.api import Entry
from agentmem_node.backup.archive import Archive, Gap, Lineage, Part, at_ms_of, gap_error
from agentmem_node.backup.catalog import choose, load
from agentmem_node.backup.chunks import Chunks, hash_of
from agentmem_node.backup.content import Content, content_of
from agentmem_node.backup.errors import BackupDamaged, BackupMissing, RestoreImpossible
from agentmem_node.backup.manifest import Manifest, ShardBackup, manifest_name
from agentmem_node.backup.objects import ObjectStore
from agentmem_node.backup.origin import Origin
from agentmem_node.backup.pipeline import in_order
from agentmem_node.backup.upload import Progress
from agentmem_node.engine.shard import Shard
from agentmem_node.model.times import format_ms
from agentmem_node.storage.checkpoint import StorageDamaged, make_folder, sync_folder
from agentmem_node.storage.environment import MAP_BYTES_DEFAULT
from agentmem_node.storage.snapshot import SnapshotWriter, discard
from agentmem_node.storage.store import Store

_BATCH_ENTRIES: Final = 512
_BATCH_BYTES: Final = 4 << 20
_ORIGIN: Final = ".origin"
_ORIGINS_MAX: Final = 12  # a folder's name has room for so many


class Fetched(NamedTuple):
    """A shard as it now stands in its folder. `at_ms`: the latest time that a command named."""

    applied_index: int
    digest: bytes
    content: Content
    at_ms: int
    replayed: int


class ShardPlan(NamedTuple):
    """What restoring a shard would use. `archived_to`: the last entry in the log's archive.

    `lineage` begins with the shard in the backup. It has more than one part for a shard that a
    split has made since; `id` and `slots` are the last one's.
    """

    lineage: Lineage
    backup_index: int
    archived_to: int
    archived_ms: int | None
    gaps: list[Gap]
    unarchived: Gap | None = None  # that its leader had, and no segment has
    end: int = 0  # the last archived entry that counts

    @property
    def id(self) -> str:
        return self.lineage[-1].shard

    @property
    def slots(self) -> tuple[int, int]:
        return self.lineage[-1].slots

    @property
    def in_backup(self) -> str:
        return self.lineage[0].shard

    @property
    def origin(self) -> Origin | None:
        """What it was taken back to by then: its state comes from there, not from the backup."""
        return self.lineage[0].origin


class Plan(NamedTuple):
    """Which backup, which part of the log, and what is missing. `faults` empty: it can be done."""

    manifest: Manifest
    until_ms: int | None
    shards: list[ShardPlan]
    faults: list[str]


def plan(
    store: ObjectStore,
    *,
    backup_id: str | None = None,
    until_ms: int | None = None,
    cluster_id: str | None = None,
) -> Plan:
    """How to come to a moment; from a backup of `cluster_id`, if that is given and none is named.
    Raises BackupMissing, BackupDamaged when there is no way at all."""
    manifest = choose(store, backup_id=backup_id, until_ms=until_ms, cluster_id=cluster_id)
    wholes = [_whole(manifest, shard) for shard in manifest.shards]
    if until_ms is None:
        return Plan(manifest, None, [ShardPlan((w,), w.base, 0, None, []) for w in wholes], [])
    faults: list[str] = []
    if until_ms < manifest.at_ms:
        faults.append(
            f"backup {manifest.id} was made at {format_ms(manifest.at_ms)}, after that moment"
        )
    archive = Archive(store, manifest.cluster_id)
    shards = []
    for whole, backed_up in zip(wholes, manifest.shards, strict=True):
        if until_ms < backed_up.newest_ms:
            faults.append(
                f"backup {manifest.id} holds writes of {whole.shard} from "
                f"{format_ms(backed_up.newest_ms)}, after that moment"
            )
        try:
            lineages = archive.lineages(whole, until_ms)
        except RestoreImpossible as error:
            faults.append(error.message.rstrip("."))
            lineages = [(whole,)]
        for lineage in lineages:
            made = _shard_plan(archive, lineage)
            shards.append(made)
            faults += _origin_faults(store, archive, lineage[0])
            if until_ms <= manifest.at_ms:
                continue
            if made.unarchived is not None:
                first, last = made.unarchived
                faults.append(f"entries {first} to {last} of {made.id} were never archived")
            if made.archived_ms is None or made.archived_ms < until_ms:
                ms = made.archived_ms
                faults.append(
                    f"the log of {made.id} was archived "
                    + ("never" if ms is None else f"until {format_ms(ms)}")
                )
    return Plan(manifest, until_ms, shards, faults)


def _whole(manifest: Manifest, shard: ShardBackup) -> Part:
    info = manifest.shard_map.shards[shard.id]
    return Part(shard.id, (info.slot_start, info.slot_end), shard.epoch, shard.applied_index)


def _origin_faults(store: ObjectStore, archive: Archive, part: Part) -> Iterator[str]:
    """Why what a shard was taken back to cannot be had any more, or what that came from."""
    origin = part.origin
    if origin is None:
        return
    taken_back = (
        f"{part.shard} was taken back to backup {origin.backup} at {format_ms(origin.at_ms)}"
    )
    try:
        manifest = load(store, origin.backup)
        whole = _whole(manifest, manifest.shard(part.shard))
    except (BackupMissing, BackupDamaged, KeyError) as error:
        yield f"{taken_back}, which cannot be read: {error}"
        return
    if origin.until_ms is None:
        return
    inner = _log_of(store, manifest, archive, part)
    try:
        (lineage,) = inner.lineages(whole, origin.until_ms)
    except (RestoreImpossible, ValueError) as error:
        yield f"{taken_back}, and the log after that does not lead to it: {error}"
        return
    gaps = inner.gaps_of(lineage, lineage[0].base)
    later = inner.first_later(lineage[-1], origin.until_ms) if gaps else None
    for gap in gaps:
        is_behind = later is not None and gap.first > later  # the moment ends before it
        if not is_behind and (origin.upto is None or gap.first <= origin.upto):
            yield f"{taken_back}, and entries {gap.first} to {gap.last} after that are missing"
    if origin.upto is not None and inner.last_of(lineage[-1]) < origin.upto:
        yield f"{taken_back}, and the log after that ends before entry {origin.upto}"
    yield from _origin_faults(store, inner, lineage[0])


def _log_of(store: ObjectStore, manifest: Manifest, archive: Archive, part: Part) -> Archive:
    """By which a shard came to what it was taken back to when `part` began. In its own cluster that
    is what was there before; so this comes to an end."""
    if manifest.cluster_id == archive.cluster_id:
        return archive.before(part.shard, part.epoch)
    return Archive(store, manifest.cluster_id)


def _shard_plan(archive: Archive, lineage: Lineage) -> ShardPlan:
    whole, last = lineage[0], lineage[-1]
    reached = archive.reached(last.shard)
    archived_to = max(whole.base, archive.last_of(last))
    unarchived = None
    if reached is not None and reached.last > archived_to:
        unarchived = Gap(archived_to + 1, reached.last)
    return ShardPlan(
        lineage,
        whole.base,
        archived_to,
        None if reached is None else reached.at_ms,
        archive.gaps_of(lineage, whole.base),
        unarchived,
        max(whole.base, archive.end_of(last)),
    )


def fetch_shard(
    store: ObjectStore,
    manifest: Manifest,
    shard_id: str,
    folder: Path,
    *,
    until_ms: int | None = None,
    upto: int | None = None,
    lineage: Lineage | None = None,
    archive: Archive | None = None,
    progress: Progress | None = None,
    map_bytes: int = MAP_BYTES_DEFAULT,
) -> Fetched:
    """Make `folder` the shard as it was at the cut, or at `until_ms`. Blocks; one thread only.

    `lineage`: as it was planned, for what the shard was split into by then (`ShardPlan`). `upto`:
    the last entry of the log that may count; with it the result is one and the same at any time,
    whatever is archived later. `archive`: the log, if not all of the manifest's cluster.

    Every chunk and the rolling digest are checked before anything is replayed, and the content
    digest when nothing was. Raises BackupDamaged, BackupMissing, BackupUnreachable,
    RestoreImpossible (a moment that the backup and the log do not reach), DiskFull, OSError; the
    folder is then not there.
    """
    progress = Progress() if progress is None else progress
    if folder.exists():
        raise InternalError(f"{folder} is there already: a restore must not replace it.")
    staged = folder.with_name(folder.name + ".fetch")
    if folder.name.count(_ORIGIN) > _ORIGINS_MAX:
        raise RestoreImpossible(
            f"Shard {shard_id} was taken back more than {_ORIGINS_MAX} times one after the other.",
            hint="Restore from a backup made after the last of them.",
        )
    archive = archive or Archive(store, manifest.cluster_id)
    lineage = lineage or _lineage(archive, manifest, _shard_of(manifest, shard_id), until_ms)
    first = lineage[0]
    if first.origin is not None:
        manifest = load(store, first.origin.backup)
    shard = _shard_of(manifest, first.shard)
    _claim(staged, f"{manifest.id} {shard.digest.hex()} {until_ms} {upto} {lineage}")
    if len(lineage) > 1:
        discard(staged)  # how far an interrupted attempt had come in which part, nobody knows
    if not staged.exists():
        if first.origin is None:
            _download(store, shard, staged, progress)
        else:
            _take_back(store, manifest, archive, first, first.origin, staged, progress, map_bytes)
    dim = manifest.model.dim
    replayed = 0
    if until_ms is not None:
        replayed = _replay(
            archive, manifest, shard, lineage, staged, dim, until_ms, upto, progress, map_bytes
        )
    fetched = _look(staged, dim, replayed)
    if len(lineage) == 1 and not replayed and first.origin is None:
        _check(manifest, shard, fetched)
    make_folder(folder.parent)
    staged.rename(folder)
    sync_folder(folder.parent)
    _claim_of(staged).unlink(missing_ok=True)
    return fetched


def _lineage(
    archive: Archive, manifest: Manifest, shard: ShardBackup, until_ms: int | None
) -> Lineage:
    """Of a shard that is still one. Raises RestoreImpossible when it was split by then."""
    whole = _whole(manifest, shard)
    if until_ms is None:
        return (whole,)
    lineages = archive.lineages(whole, until_ms)
    if len(lineages) == 1:
        return lineages[0]
    into = ", ".join(one[-1].shard for one in lineages)
    raise RestoreImpossible(
        f"Shard {shard.id} was split at entry {lineages[0][1].base}: by then it is {into}.",
        hint="`agentmem backup restore` brings back the memories of all parts.",
        shard=shard.id,
    )


def abandon(folder: Path) -> None:
    """Remove what an interrupted fetch into `folder` left behind."""
    staged = folder.with_name(folder.name + ".fetch")
    _discard_all(staged)
    _claim_of(staged).unlink(missing_ok=True)


# -- steps --------------------------------------------------------------------------------


def _download(store: ObjectStore, shard: ShardBackup, staged: Path, progress: Progress) -> None:
    chunks = Chunks(store)
    progress.phase = "downloading"
    progress.total_bytes = shard.size_bytes
    writer = SnapshotWriter(staged, shard.size_bytes)
    try:
        hashes = shard.hashes

        def download(number: int) -> tuple[int, int]:
            """(bytes of the chunk, bytes that had to be fetched)."""
            progress.check()
            standing = writer.standing(number)
            if standing is not None and hash_of(standing) == hashes[number]:
                return len(standing), 0
            data = chunks.get(hashes[number])
            try:
                writer.write(number, data)
            except ValueError as error:
                raise BackupDamaged(f"Shard {shard.id} of the backup: {error}.") from error
            return len(data), len(data)

        for size_bytes, moved_bytes in in_order(download, len(hashes), "restore-chunk"):
            progress.done_bytes += size_bytes
            progress.moved_bytes += moved_bytes
        writer.finish(shard.checkpoint)
    finally:
        writer.close()


def _take_back(
    store: ObjectStore,
    manifest: Manifest,
    archive: Archive,
    part: Part,
    origin: Origin,
    staged: Path,
    progress: Progress,
    map_bytes: int,
) -> None:
    """What the shard was taken back to, as the first state of the epoch that began with it."""
    made = staged.with_name(staged.name + _ORIGIN)
    if not made.exists():
        fetch_shard(
            store,
            manifest,
            part.shard,
            made,
            until_ms=origin.until_ms,
            upto=origin.upto,
            archive=_log_of(store, manifest, archive, part),
            progress=progress,
            map_bytes=map_bytes,
        )
    shard = _open(made, part.shard, manifest.model.dim, map_bytes)
    try:
        if origin.digest and shard.digest() != origin.digest:
            raise BackupDamaged(
                f"Shard {part.shard} was taken back to backup {manifest.id}, and what that comes "
                "to now has another digest than then.",
                hint="Restore a moment before that, or from a backup made after it.",
                object=manifest_name(manifest.id),
            )
        shard.rebase(part.base, part.epoch - 1)
        job = shard.checkpoint()
        if job is not None:
            job.run()
            shard.checkpoint_done(job)
    finally:
        shard.close()
    made.rename(staged)
    sync_folder(staged.parent)


def _replay(
    archive: Archive,
    manifest: Manifest,
    shard: ShardBackup,
    lineage: Lineage,
    staged: Path,
    dim: int,
    until_ms: int,
    upto: int | None,
    progress: Progress,
    map_bytes: int,
) -> int:
    """How many entries further the shard is. It is closed with a checkpoint: a crash before it
    loses nothing but the work."""
    progress.phase = "replaying"
    newest_ms = shard.newest_ms
    if newest_ms > until_ms and lineage[0].origin is None:
        raise RestoreImpossible(
            f"Backup {manifest.id} holds writes of shard {shard.id} from {format_ms(newest_ms)}, "
            f"after {format_ms(until_ms)}.",
            hint="Choose an older backup, or leave the choice to the command.",
        )
    open_shard = _open(staged, shard.id, dim, map_bytes)
    try:
        start = open_shard.applied_index
        is_as_backed_up = start == shard.applied_index and lineage[0].origin is None
        if is_as_backed_up and open_shard.digest() != shard.digest:
            raise _differs(manifest, shard, "the digest of its log")
        epoch = open_shard.epoch_state.epoch
        for number, part in enumerate(lineage):
            if number:
                if open_shard.applied_index != part.base:
                    raise gap_error(part.shard, Gap(open_shard.applied_index + 1, part.base))
                _restrict(open_shard, part, progress)
                epoch = part.epoch
            end = upto if part is lineage[-1] else None
            done = open_shard.applied_index
            entries = archive.entries(part.shard, done, epoch, until_ms, part.slots, end)
            if not _apply_until(open_shard, entries, until_ms, progress):
                if part is not lineage[-1]:
                    _restrict(open_shard, lineage[-1], progress)
                break
        return open_shard.applied_index - lineage[0].base
    finally:
        open_shard.close()


def _restrict(shard: Shard, part: Part, progress: Progress) -> None:
    for _ in shard.restrict(*part.slots):
        progress.check()


def _apply_until(
    shard: Shard,
    batches: Iterator[list[Entry]],
    until_ms: int,
    progress: Progress,
) -> bool:
    """Whether all of them were of that moment or before it."""
    for batch in batches:
        progress.check()
        wanted: list[Entry] = []
        for entry in batch:
            at_ms = at_ms_of(entry.command)
            if at_ms is not None and at_ms > until_ms:
                _apply(shard, wanted)
                return False
            wanted.append(entry)
        _apply(shard, wanted)
    return True


def _apply(shard: Shard, entries: list[Entry]) -> None:
    for batch in _batches(entries):
        shard.apply(batch)


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) >= _BATCH_ENTRIES or size + len(entry.command) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += len(entry.command)
    if batch:
        yield batch


def _look(staged: Path, dim: int, replayed: int) -> Fetched:
    with_store = _reading(staged, dim)
    try:
        state = with_store.state
        content = content_of(with_store.env.txn, with_store.env.db)
        return Fetched(state.applied_index, state.digest, content, state.ledger_ms, replayed)
    finally:
        with_store.env.close()


def _check(manifest: Manifest, shard: ShardBackup, fetched: Fetched) -> None:
    found = (fetched.applied_index, fetched.digest)
    if found != (shard.applied_index, shard.digest):
        raise _differs(manifest, shard, "the digest of its log")
    if fetched.content != Content(shard.memories, shard.content):
        raise _differs(manifest, shard, "the digest of its content")


def _differs(manifest: Manifest, shard: ShardBackup, what: str) -> BackupDamaged:
    return BackupDamaged(
        f"Shard {shard.id} of backup {manifest.id} does not come to what was backed up: {what} "
        "differs.",
        hint="Restore from another backup, and report this: the chunks are as they were written.",
        object=manifest_name(manifest.id),
    )


def _shard_of(manifest: Manifest, shard_id: str) -> ShardBackup:
    try:
        return manifest.shard(shard_id)
    except KeyError:
        raise RestoreImpossible(f"Backup {manifest.id} has no shard {shard_id}.") from None


def _open(folder: Path, shard_id: str, dim: int, map_bytes: int) -> Shard:
    try:
        return Shard.open(folder, shard_id, dim=dim, map_size=map_bytes)
    except StorageDamaged as error:
        raise BackupDamaged(error.message) from error


def _reading(folder: Path, dim: int) -> Store:
    try:
        return Store.open(folder, dim=dim)
    except StorageDamaged as error:
        raise BackupDamaged(error.message) from error


# -- whose the files are --------------------------------------------------------------------


def _claim_of(staged: Path) -> Path:
    return staged.with_name(staged.name + ".json")


def _claim(staged: Path, owner: str) -> None:
    """Keep what is there of an earlier attempt at the same, and of no other."""
    path = _claim_of(staged)
    make_folder(staged.parent)
    try:
        if msgspec.json.decode(path.read_bytes(), type=str) == owner:
            return
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        pass
    _discard_all(staged)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(msgspec.json.encode(owner))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def _discard_all(staged: Path) -> None:
    discard(staged)
    # What it was to be made of, and of that again.
    for left in staged.parent.glob(f"{staged.name}*"):
        if left != _claim_of(staged):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
