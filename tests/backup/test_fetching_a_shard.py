"""A shard comes back with the digests that it had, at the cut or at any moment after it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem_cluster.epochs.commands import Begin, Seal
from agentmem_cluster.epochs.commands import encode as control
from agentmem_cluster.raft.api import Entry
from agentmem_node.backup.archive import Archive, Gap, Segment
from agentmem_node.backup.content import total
from agentmem_node.backup.errors import BackupDamaged, BackupMissing, RestoreImpossible
from agentmem_node.backup.fetch import abandon, fetch_shard, plan
from agentmem_node.backup.manifest import manifest_name
from agentmem_node.backup.objects import DirectoryStore, ObjectStore, open_store
from agentmem_node.backup.rows import FetchedShard
from agentmem_node.backup.upload import Progress
from agentmem_node.engine.shard import Shard
from agentmem_node.storage.snapshot import partial_folder
from tests.backup.making import (
    CLUSTER,
    DIM,
    MAP_BYTES,
    START_MS,
    SmallCluster,
    add,
    an_id,
    delete,
    entry,
    update,
)

USERS = ("ana", "ben", "eva", "tom", "zoe")


def live(cluster: SmallCluster, chance: random.Random, writes: int, first: int = 0) -> None:
    """Adds, updates and deletions by several users, a millisecond apart."""
    kept: dict[str, list[tuple[object, int]]] = {user: [] for user in USERS}
    for number in range(first, first + writes):
        user = chance.choice(USERS)
        at_ms = START_MS + number
        if kept[user] and chance.random() < 0.4:
            op, version = kept[user].pop()
            if chance.random() < 0.5:
                cluster.write(delete(op), at_ms=at_ms, user=user)
            else:
                text = f"version {version + 1} " * 20
                cluster.write(update(op, version + 1, text, user), at_ms=at_ms, user=user)
                kept[user].append((op, version + 1))
        else:
            op = add(number, f"memory {number} of {user} " * 30, user)
            cluster.write(op, at_ms=at_ms, user=user)
            kept[user].append((op, 1))


def test_every_shard_comes_back_with_its_digests(store: ObjectStore, tmp_path: Path) -> None:
    cluster = SmallCluster(tmp_path / "shards", 3)
    live(cluster, random.Random(1), 120)
    manifest = cluster.backup(store, START_MS + 120)
    before = {name: shard.digest() for name, shard in cluster.open.items()}
    contents = cluster.content()
    live(cluster, random.Random(2), 60, first=1_000)  # the backup must not see these
    parts = []
    for name, digest in before.items():
        fetched = fetch_shard(store, manifest, name, tmp_path / "back" / name)
        assert fetched.digest == digest
        parts.append(fetched.content)
        again = Shard.open(tmp_path / "back" / name, name, dim=DIM, map_size=MAP_BYTES)
        assert again.digest() == digest
        again.close()
    assert total(parts) == contents == manifest.content
    assert cluster.content() != contents
    cluster.close()


def test_a_second_backup_uploads_what_changed_only(store: ObjectStore, tmp_path: Path) -> None:
    cluster = SmallCluster(tmp_path / "shards", 1)
    for number in range(40):
        many = [add(number * 50 + n, os.urandom(900).hex()) for n in range(50)]
        cluster.write(*many, at_ms=START_MS + number)
    first = cluster.backup(store, START_MS + 100)
    cluster.write(add(99_999), at_ms=START_MS + 101)
    second = cluster.backup(store, START_MS + 102)
    assert first.shards[0].uploaded_chunks == first.shards[0].size_bytes // (1 << 20) + 1
    assert 0 < second.shards[0].uploaded_chunks <= first.shards[0].uploaded_chunks / 2
    third = cluster.backup(store, START_MS + 103)
    assert third.shards[0].uploaded_chunks <= 2  # an empty commit of LMDB touches few pages
    for number, manifest in enumerate((first, second, third)):
        fetch_shard(store, manifest, "s00", tmp_path / f"back{number}")
    cluster.close()


@pytest.mark.parametrize("seed", range(3))
def test_any_moment_is_rebuilt_as_it_was(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 2)
    live(cluster, chance, 30)
    cluster.backup(store, START_MS + 30)
    recorded = {}
    for step in range(8):
        live(cluster, chance, 10, first=100 * (step + 1))
        recorded[START_MS + 100 * (step + 1) + 50] = (
            {name: (s.applied_index, s.digest()) for name, s in cluster.open.items()},
            cluster.content(),
        )
        if step == 4:
            cluster.backup(store, START_MS + 100 * (step + 1) + 40)
    cluster.archive(store, sorted(chance.sample(range(1, 60), 5)), START_MS + 10_000)
    bases = set()
    for number, (at_ms, (shards, content)) in enumerate(recorded.items()):
        found = plan(store, until_ms=at_ms)
        assert found.faults == []
        bases.add(found.manifest.id)
        parts = []
        for name, (index, digest) in shards.items():
            folder = tmp_path / "back" / f"{number}" / name
            fetched = fetch_shard(
                store, found.manifest, name, folder, until_ms=at_ms, map_bytes=MAP_BYTES
            )
            assert (fetched.applied_index, fetched.digest) == (index, digest)
            parts.append(fetched.content)
        assert total(parts) == content
    assert len(bases) == 2
    cluster.close()


def test_a_moment_between_two_writes_of_a_clock_that_went_back_is_never_torn(
    tmp_path: Path,
) -> None:
    """The running maximum counts: what came after a later write is later."""
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    for number, offset in enumerate((10, 30, 20, 40)):
        cluster.write(add(number), at_ms=START_MS + offset)
    cluster.archive(store, [2], START_MS + 100)
    indexes = []
    for offset in (9, 10, 25, 30, 35, 40):
        folder = tmp_path / f"back{offset}"
        until = START_MS + offset
        fetched = fetch_shard(store, manifest, "s00", folder, until_ms=until, map_bytes=MAP_BYTES)
        indexes.append(fetched.applied_index)
    assert indexes == [0, 1, 1, 3, 3, 4]
    cluster.close()


def test_a_gap_in_the_archived_log_is_named_and_not_jumped(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    for number in range(30):
        cluster.write(add(number), at_ms=START_MS + number)
    cluster.archive(store, [10, 20], START_MS + 100)
    store.delete(Segment(CLUSTER, "s00", 1, 11, 20).name)
    archive = Archive(store, CLUSTER)
    assert archive.gaps("s00") == [Gap(11, 20)]
    with pytest.raises(RestoreImpossible, match="lacks entries 11 to 20"):
        fetch_shard(store, manifest, "s00", tmp_path / "late", until_ms=START_MS + 25)
    assert not (tmp_path / "late").exists()
    early = fetch_shard(
        store, manifest, "s00", tmp_path / "early", until_ms=START_MS + 8, map_bytes=MAP_BYTES
    )
    assert early.applied_index == 9
    assert plan(store, until_ms=START_MS + 25).shards[0].gaps == [Gap(11, 20)]
    cluster.close()


def test_a_moment_that_the_log_does_not_reach_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    cluster.backup(store, START_MS)
    cluster.archive(store, [], START_MS + 100)
    assert plan(store, until_ms=START_MS + 100).faults == []
    assert "was archived until" in plan(store, until_ms=START_MS + 101).faults[0]
    with pytest.raises(BackupMissing, match="before that moment"):
        plan(store, until_ms=START_MS - 1)
    cluster.close()


def test_what_followed_a_seal_is_not_replayed_and_the_next_epoch_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    shard = cluster.open["s00"]
    first = [entry(1, add(1)), Entry(2, 1, control(Seal(1)))]
    late = [entry(3, add(3)), entry(4, add(4))]
    second = [Entry(3, 2, control(Begin(2))), entry(4, add(5)), entry(5, add(6))]
    shard.apply(first)
    shard.apply(second)
    archive = Archive(store, CLUSTER)
    slots = cluster.slots("s00")
    archive.append("s00", 1, [*first, *late[:1]], slots)
    archive.append("s00", 1, late[1:], slots)
    archive.append("s00", 2, second, slots)
    fetched = fetch_shard(
        store, manifest, "s00", tmp_path / "back", until_ms=START_MS + 99, map_bytes=MAP_BYTES
    )
    assert (fetched.applied_index, fetched.digest) == (5, shard.digest())
    # A moment before the second epoch's first write is the first epoch's alone.
    before = fetch_shard(
        store, manifest, "s00", tmp_path / "before", until_ms=START_MS + 1, map_bytes=MAP_BYTES
    )
    assert before.applied_index == 2
    cluster.close()


def test_an_epoch_founded_from_an_older_state_takes_the_place_of_what_it_undid(
    tmp_path: Path,
) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    shard = cluster.open["s00"]
    archive = Archive(store, CLUSTER)
    undone = [entry(n, add(n), at_ms=START_MS + n) for n in range(1, 9)]
    archive.append("s00", 1, undone, cluster.slots("s00"))
    kept = undone[:4]
    again = [Entry(5, 2, control(Begin(2)))]
    again += [entry(n, add(100 + n), at_ms=START_MS + 50 + n) for n in range(6, 9)]
    archive.append("s00", 2, again, cluster.slots("s00"))
    shard.apply([*kept, *again])
    now = fetch_shard(
        store, manifest, "s00", tmp_path / "now", until_ms=START_MS + 99, map_bytes=MAP_BYTES
    )
    assert now.digest == shard.digest()
    then = fetch_shard(
        store, manifest, "s00", tmp_path / "then", until_ms=START_MS + 8, map_bytes=MAP_BYTES
    )
    assert (then.applied_index, then.content.memories) == (8, 8)
    cluster.close()


def test_a_moment_after_a_split_is_refused_and_one_before_it_is_not(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    archive = Archive(store, CLUSTER)
    whole, half = (0, 16_384), (0, 8_192)
    archive.append(
        "s00", 1, [entry(1, add(1)), entry(2, add(2)), Entry(3, 1, control(Seal(1)))], whole
    )
    archive.append("s00", 2, [Entry(4, 2, control(Begin(2))), entry(5, add(3))], half)
    with pytest.raises(RestoreImpossible, match="was split at entry 3"):
        fetch_shard(store, manifest, "s00", tmp_path / "late", until_ms=START_MS + 9)
    assert not (tmp_path / "late").exists()
    before = fetch_shard(
        store, manifest, "s00", tmp_path / "early", until_ms=START_MS + 1, map_bytes=MAP_BYTES
    )
    assert before.applied_index == 1
    cluster.close()


def test_what_one_owner_has_is_read_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    cluster.write(add(1), add(2, "Ana moved"), at_ms=START_MS)
    cluster.write(delete(add(2, "Ana moved")), at_ms=START_MS + 1)
    cluster.write(add(3, "Ben", "ben"), at_ms=START_MS, user="ben")
    cluster.write(add(4, tenant="other"), at_ms=START_MS, tenant="other")
    fetch_shard(store, cluster.backup(store, START_MS + 9), "s00", tmp_path / "back")
    cluster.close()
    back = FetchedShard(tmp_path / "back", DIM)
    ana = {row.id: row for row in back.rows("acme", "user:ana")}
    assert ana.keys() == {an_id(1), an_id(2)}
    assert ana[an_id(1)].live is not None and ana[an_id(1)].vector == add(1).vector
    assert ana[an_id(2)].live is None and len(ana[an_id(2)].past) == 2
    assert len(list(back.rows("acme"))) == 3
    assert len(list(back.rows())) == 4
    assert list(back.rows("nobody")) == []
    back.close()


class Interrupted(Exception):
    pass


class Failing(DirectoryStore):
    """Ends the process's work after so many reads."""

    def __init__(self, folder: Path, reads: int) -> None:
        super().__init__(folder)
        self.reads = reads

    def get(self, name: str) -> bytes:
        if self.reads == 0:
            raise Interrupted
        self.reads -= 1
        return super().get(name)


def test_an_interrupted_fetch_leaves_nothing_half_done_and_goes_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    for number in range(8):
        many = [add(number * 50 + n, os.urandom(4_000).hex()) for n in range(50)]
        cluster.write(*many, at_ms=START_MS + number)
    manifest = cluster.backup(store, START_MS + 100)
    cluster.close()
    folder = tmp_path / "back"
    with pytest.raises(Interrupted):
        fetch_shard(Failing(tmp_path / "store", 2), manifest, "s00", folder)
    assert not folder.exists()
    progress = Progress()
    fetch_shard(store, manifest, "s00", folder, progress=progress)
    assert progress.moved_bytes < manifest.shards[0].size_bytes == progress.done_bytes
    left = {path.name for path in tmp_path.iterdir()} - {"store", "shards", "back"}
    assert left == set()


def test_leftovers_of_another_backup_are_not_used(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    cluster.write(add(1), at_ms=START_MS)
    first = cluster.backup(store, START_MS + 1)
    cluster.write(add(2), at_ms=START_MS + 2)
    second = cluster.backup(store, START_MS + 3)
    cluster.close()
    folder = tmp_path / "back"
    with pytest.raises(Interrupted):
        fetch_shard(Failing(tmp_path / "store", 0), first, "s00", folder)
    assert partial_folder(folder.with_name("back.fetch")).exists()
    assert fetch_shard(store, second, "s00", folder).content.memories == 2
    with pytest.raises(Interrupted):
        fetch_shard(Failing(tmp_path / "store", 0), first, "s00", tmp_path / "other")
    abandon(tmp_path / "other")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"store", "shards", "back"}


_FETCH = """
import sys
from pathlib import Path
from agentmem_node.backup.catalog import choose
from agentmem_node.backup.fetch import fetch_shard
from agentmem_node.backup.objects import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
manifest = choose(store)
fetch_shard(store, manifest, "s00", Path(sys.argv[2]), until_ms=int(sys.argv[3]),
            map_bytes=256 << 20)
print("done", flush=True)
"""


@pytest.mark.process
def test_a_fetch_that_is_killed_anywhere_is_run_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    for number in range(10):
        many = [add(number * 50 + n, os.urandom(3_000).hex()) for n in range(50)]
        cluster.write(*many, at_ms=START_MS + number)
    manifest = cluster.backup(store, START_MS + 20)
    live(cluster, random.Random(3), 300, first=100)
    cluster.archive(store, list(range(20, 300, 20)), START_MS + 1_000)
    expected = cluster.open["s00"].digest()
    cluster.close()
    folder = tmp_path / "back"
    chance = random.Random(4)
    killed = 0
    for attempt in range(40):
        child = subprocess.Popen(
            [sys.executable, "-c", _FETCH, store.url, str(folder), str(START_MS + 999)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            child.wait(chance.uniform(0, 0.02 * (attempt + 1)))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait(10)
        child.stdout.close()
        if folder.exists():
            break
        assert child.returncode != 0
    assert killed >= 1
    shard = Shard.open(folder, "s00", dim=DIM, map_size=MAP_BYTES)
    assert shard.digest() == expected
    shard.close()
    assert manifest_name(manifest.id) in {item.name for item in store.list("backups/")}


def test_damage_in_the_archived_log_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cluster = SmallCluster(tmp_path / "shards", 1)
    manifest = cluster.backup(store, START_MS - 1)
    for number in range(20):
        cluster.write(add(number), at_ms=START_MS + number)
    cluster.archive(store, [10], START_MS + 100)
    cluster.close()
    name = Segment(CLUSTER, "s00", 1, 11, 20).name
    whole = store.get(name)
    for wrong in (whole[:-1], whole[:20], b"", whole[:99] + b"\0" + whole[100:]):
        if wrong == whole:
            continue
        store.put(name, wrong)
        with pytest.raises(BackupDamaged, match="is damaged"):
            fetch_shard(
                store,
                manifest,
                "s00",
                tmp_path / "back",
                until_ms=START_MS + 50,
                map_bytes=MAP_BYTES,
            )
        assert not (tmp_path / "back").exists()
