"""Whatever happens to the files of a backup, verify finds it, and restoring refuses it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from agentmem_node.backup import catalog
from agentmem_node.backup.archive import Archive, Segment
from agentmem_node.backup.catalog import Notice
from agentmem_node.backup.chunks import Chunks
from agentmem_node.backup.errors import BackupBusy, BackupDamaged, BackupMissing
from agentmem_node.backup.fetch import fetch_shard, plan
from agentmem_node.backup.manifest import manifest_name
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.backup.prune import prune
from agentmem_node.backup.verify import verify
from tests.backup.making import CLUSTER, START_MS, SmallCluster, add

HOW = ("flipped", "cut", "empty", "zeroed")


def filled(store: ObjectStore, path: Path, backups: int = 1) -> SmallCluster:
    cluster = SmallCluster(path, 2)
    number = 0
    for backup in range(backups):
        for user in ("ana", "ben", "eva", "tom"):
            number += 1
            op = add(number, os.urandom(2_000).hex(), user)
            cluster.write(op, at_ms=START_MS + number, user=user)
        cluster.backup(store, START_MS + 1_000 * (backup + 1))
    cluster.archive(store, [3], START_MS + 5_000)
    return cluster


def test_a_whole_store_is_found_whole(store: ObjectStore, tmp_path: Path) -> None:
    filled(store, tmp_path / "shards", 2).close()
    told = []
    found = verify(store, told=lambda done, total: told.append((done, total)))
    assert (found.faults, found.gaps, found.backups) == ([], [], 2)
    assert found.chunks >= 3 and found.segments >= 2
    assert told[-1][0] == told[-1][1] == len(told)


def damages(data: bytes, chance: random.Random) -> dict[str, bytes | None]:
    at = chance.randrange(len(data))
    flipped = bytearray(data)
    flipped[at] ^= 1 << chance.randrange(8)
    return {
        "flipped": bytes(flipped),
        "cut": data[: chance.randrange(len(data))],
        "empty": b"",
        "zeroed": bytes(len(data)),
        "missing": None,
    }


# A manifest that is gone is no backup; gaps of the log have tests of their own.
DAMAGES = [
    *((kind, how) for kind in ("backups/", "chunks/", "log/") for how in HOW),
    ("chunks/", "missing"),
]


@pytest.mark.parametrize(("kind", "how"), DAMAGES)
@pytest.mark.parametrize("seed", range(3))
def test_damage_of_any_object_is_found_and_refused(
    kind: str, how: str, seed: int, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    filled(store, tmp_path / "shards").close()
    manifest = catalog.choose(store)
    chance = random.Random(f"{kind}{how}{seed}")
    name = chance.choice([item.name for item in store.list(kind)])
    wrong = damages(store.get(name), chance)[how]
    if wrong is None:
        store.delete(name)
    else:
        store.put(name, wrong)
    found = verify(store)
    assert [fault.object for fault in found.faults] == [name]
    assert not found.is_good
    if kind == "log/":
        segment = Segment.of_name(name)
        assert segment is not None and found.faults[0].backups == []
        with pytest.raises(BackupDamaged):
            list(Archive(store, CLUSTER).entries(segment.shard, 0, 1, None))
        return
    assert found.faults[0].backups == [manifest.id]
    with pytest.raises((BackupDamaged, BackupMissing)):
        again = catalog.choose(store)
        for shard in again.shards:
            fetch_shard(store, again, shard.id, tmp_path / "back" / shard.id)


def test_a_mark_of_how_far_the_log_is_archived_is_checked_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    filled(store, tmp_path / "shards").close()
    name = f"archived/{CLUSTER}/s00.json"
    store.put(name, store.get(name)[:-3])
    assert [fault.object for fault in verify(store).faults] == [name]
    with pytest.raises(BackupDamaged):
        plan(store, until_ms=START_MS + 2_000)


def test_a_segment_that_is_lost_is_told_as_a_gap(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    cluster.backup(store, START_MS)
    for number in range(9):
        cluster.write(add(number), at_ms=START_MS + number)
    cluster.archive(store, [3, 6], START_MS + 100)
    cluster.close()
    store.delete(Segment(CLUSTER, "s00", 1, 4, 6).name)
    found = verify(store)
    assert (found.faults, found.gaps) == ([], [f"{CLUSTER}/s00: entries 4 to 6"])


def test_one_backup_is_verified_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    filled(store, tmp_path / "shards", 2).close()
    first, second = (item.id for item in catalog.listed(store))
    store.put(manifest_name(first), b"{}")
    assert verify(store, backup_id=second).is_good
    assert [fault.backups for fault in verify(store, backup_id=first).faults] == [[first]]
    with pytest.raises(BackupMissing, match="no backup 'nothing'"):
        verify(store, backup_id="nothing")


def test_pruning_keeps_what_the_kept_backups_need(store: ObjectStore, tmp_path: Path) -> None:
    filled(store, tmp_path / "shards", 3).close()
    before = [item.id for item in catalog.listed(store)]
    chunks = {item.name for item in store.list("chunks/")}
    done = prune(store, 1, now_ms=lambda: _far(store), token="t", grace_ms=0)
    assert (done.removed, done.kept) == (before[:2], before[2:])
    assert 0 < done.chunks < len(chunks) and done.freed_bytes > 0
    assert verify(store).faults == []
    manifest = catalog.choose(store)
    for shard in manifest.shards:
        fetch_shard(store, manifest, shard.id, tmp_path / "back" / shard.id)
    assert list(store.list("running/")) == []


def test_the_log_is_kept_from_the_oldest_kept_backup_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    for number in range(4):
        cluster.write(add(number), at_ms=START_MS + number)
        if number % 2:
            cluster.backup(store, START_MS + 1_000 * number)
    cluster.archive(store, [1, 2, 3], START_MS + 5_000)
    cluster.close()
    prune(store, 2, now_ms=lambda: _far(store), token="t")
    assert [s.first for s in Archive(store, CLUSTER).segments("s00")] == [3, 4]


def test_fresh_chunks_that_nobody_names_yet_are_left_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    filled(store, tmp_path / "shards").close()
    Chunks(store).put(b"of a backup that was interrupted")
    now_ms = max(item.modified_ms for item in store.list("chunks/")) + 1
    assert prune(store, 1, now_ms=lambda: now_ms, token="t").chunks == 0
    late = prune(store, 1, now_ms=lambda: now_ms + 100_000_000, token="t")
    assert late.chunks == 1


def test_a_manifest_that_cannot_be_read_stops_pruning(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    filled(store, tmp_path / "shards", 2).close()
    names = [item.name for item in store.list("")]
    store.put(manifest_name(catalog.listed(store)[0].id), b"?")
    with pytest.raises(BackupDamaged, match="nothing is removed"):
        prune(store, 1, now_ms=lambda: _far(store), token="t", grace_ms=0)
    assert [item.name for item in store.list("")] == names


def test_backups_and_pruning_keep_out_of_each_others_way(store: ObjectStore) -> None:
    making = Notice.begin(store, "create", "a", lambda: START_MS)
    also = Notice.begin(store, "create", "b", lambda: START_MS)
    with pytest.raises(BackupBusy, match="being made"):
        Notice.begin(store, "prune", "p", lambda: START_MS + 1)
    also.end()
    making.end()
    pruning = Notice.begin(store, "prune", "p", lambda: START_MS)
    with pytest.raises(BackupBusy, match="being removed"):
        Notice.begin(store, "create", "a", lambda: START_MS + 1)
    # Its process was killed: nothing is heard of it any more.
    Notice.begin(store, "create", "a", lambda: START_MS + catalog.STALE_MS).end()
    pruning.end()
    assert list(store.list("running/")) == []


def _far(store: ObjectStore) -> int:
    """A moment after everything in the store was written."""
    return max(item.modified_ms for item in store.list("")) + 60_000


def test_two_backups_of_one_second_are_in_their_order(tmp_path: Path) -> None:
    """Within a second their ids are drawn at random: the newest is not the one that sorts last."""
    store = open_store(str(tmp_path / "store"))
    cluster = filled(store, tmp_path / "shards", 0)
    turn_ms = (START_MS >> 24) + 1 << 24
    older = cluster.backup(store, turn_ms - 1)
    newer = cluster.backup(store, turn_ms)
    cluster.close()
    assert older.id[:16] == newer.id[:16] and older.id > newer.id
    assert [item.id for item in catalog.listed(store)] == [older.id, newer.id]
    assert catalog.choose(store).id == newer.id
