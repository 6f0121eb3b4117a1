"""Any moment after the oldest backup, although shards were split since: each part is rebuilt of
the whole's snapshot, the whole's log up to the split, and its own log."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentmem_cluster.epochs.commands import Begin, Seal
from agentmem_cluster.epochs.commands import encode as control
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.ring import slot_of
from agentmem_node.backup.archive import Archive, Reached, Segment
from agentmem_node.backup.content import Content, content_of, total
from agentmem_node.backup.errors import BackupDamaged, RestoreImpossible
from agentmem_node.backup.fetch import Fetched, fetch_shard, plan
from agentmem_node.backup.manifest import Manifest
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.backup.prune import prune
from agentmem_node.backup.verify import verify
from agentmem_node.engine.shard import Shard
from tests.backup.making import (
    CLUSTER,
    DIM,
    MAP_BYTES,
    START_MS,
    SmallCluster,
    add,
    delete,
    entry,
    update,
)

USERS = tuple(f"user{number}" for number in range(400))
SLOTS = 16_384
END_MS = START_MS + 1_000_000


@dataclass
class Splitting:
    """Shards that take writes, are moved and split; all that they applied is archived."""

    folder: Path
    store: ObjectStore
    chance: random.Random
    shards: dict[str, Shard] = field(default_factory=dict)
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    logs: dict[tuple[str, int], list[Entry]] = field(default_factory=dict)
    first_of: dict[str, Entry] = field(default_factory=dict)  # of the epoch that a split began
    now_ms: int = START_MS
    kept: list[tuple[str, object, int]] = field(default_factory=list)
    cluster_id: str = CLUSTER

    def begin(self) -> Manifest:
        """One shard, a backup of it, and some writes before that."""
        small = SmallCluster(self.folder / "whole", 1, self.cluster_id)
        self._take("s00", small.open["s00"], (0, SLOTS), 1)
        self.write(20)
        made = small.backup(self.store, self.now_ms)
        self.logs.clear()
        return made

    def _take(self, name: str, shard: Shard, slots: tuple[int, int], epoch: int) -> None:
        self.shards[name], self.slots[name], self.epochs[name] = shard, slots, epoch

    def _shard_of(self, user: str) -> str:
        slot = slot_of("acme", f"user:{user}")
        return next(n for n, (a, b) in self.slots.items() if a <= slot < b)

    def write(self, count: int, into: str | None = None) -> None:
        """A millisecond apart. `into`: to no other shard."""
        users = [user for user in USERS if into in (None, self._shard_of(user))]
        for _ in range(count):
            self.now_ms += 1
            kept = [one for one in self.kept if one[0] in users]
            if kept and self.chance.random() < 0.4:
                user, op, version = self.chance.choice(kept)
                self.kept.remove((user, op, version))
                if self.chance.random() < 0.4:
                    made = delete(op)  # type: ignore[arg-type]
                else:
                    made = update(op, version + 1, f"version {version + 1} of it", user)  # type: ignore[arg-type]
                    self.kept.append((user, op, version + 1))
            else:
                user = self.chance.choice(users)
                made = add(self.now_ms - START_MS, f"memory {self.now_ms} of {user}", user)
                self.kept.append((user, made, 1))
            name = self._shard_of(user)
            index = self.shards[name].applied_index + 1
            self._apply(name, entry(index, made, at_ms=self.now_ms))

    def _apply(self, name: str, made: Entry) -> None:
        self.shards[name].apply([made])
        self.logs.setdefault((name, self.epochs[name]), []).append(made)

    def _seal(self, name: str) -> int:
        index = self.shards[name].applied_index + 1
        self._apply(name, Entry(index, 1, control(Seal(self.epochs[name]))))
        return index

    def move(self, name: str) -> None:
        index = self._seal(name)
        self.epochs[name] += 1
        self._apply(name, Entry(index + 1, 2, control(Begin(self.epochs[name]))))

    def split(self, name: str, new: str, at: int) -> None:
        index = self._seal(name)
        start, end = self.slots[name]
        epoch = self.epochs[name] + 1
        env = self.shards[name]._store.env
        whole = env.folder
        self.shards[name].close()
        self.archive()
        for part, slots in ((name, (start, at)), (new, (at, end))):
            folder = self.folder / f"{part}-{epoch}"
            shutil.copytree(whole, folder)
            shard = Shard.open(folder, part, dim=DIM, map_size=MAP_BYTES)
            for _ in shard.restrict(*slots):
                pass
            self._take(part, shard, slots, epoch)
            self.first_of[part] = Entry(index + 1, 2, control(Begin(epoch)))
            self._apply(part, self.first_of[part])

    def archive(self) -> None:
        archive = Archive(self.store, self.cluster_id)
        for (name, epoch), entries in self.logs.items():
            while entries:
                size = self.chance.randint(1, len(entries))
                slots = self.slots[name]
                archive.append(name, epoch, entries[:size], slots)
                del entries[:size]
        for name, epoch in self.epochs.items():
            last = 0 if name not in self.shards else 1
            archive.mark(name, Reached(epoch, last, END_MS))

    def state(self) -> tuple[dict[str, tuple[int, bytes]], Content]:
        found = {name: (s.applied_index, s.digest()) for name, s in self.shards.items()}
        envs = [shard._store.env for shard in self.shards.values()]
        return found, total([content_of(env.txn, env.db) for env in envs])

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        shutil.rmtree(self.folder)


@pytest.fixture
def splitting(tmp_path: Path, request: pytest.FixtureRequest) -> Splitting:
    chance = random.Random(getattr(request, "param", 1))
    return Splitting(tmp_path / "shards", open_store(str(tmp_path / "store")), chance)


def rebuilt(
    store: ObjectStore,
    manifest: Manifest,
    folder: Path,
    until_ms: int,
    *,
    may_have_gaps: bool = False,
) -> tuple[dict[str, tuple[int, bytes]], Content]:
    found = plan(store, backup_id=manifest.id, until_ms=until_ms)
    assert found.faults == []
    assert may_have_gaps or [gap for shard in found.shards for gap in shard.gaps] == []
    parts, contents = {}, []
    for shard in found.shards:
        fetched = fetch_shard(
            store,
            manifest,
            shard.in_backup,
            folder / shard.id,
            until_ms=until_ms,
            lineage=shard.lineage,
            map_bytes=MAP_BYTES,
        )
        parts[shard.id] = (fetched.applied_index, fetched.digest)
        contents.append(fetched.content)
        shutil.rmtree(folder / shard.id)  # a part leaves room behind: many of them fill the disk
    return parts, total(contents)


@pytest.mark.parametrize("splitting", range(3), indirect=True)
def test_any_moment_is_rebuilt_over_moves_and_splits_of_what_was_split(
    splitting: Splitting, tmp_path: Path
) -> None:
    manifest = splitting.begin()
    recorded = []

    def live() -> None:
        for _ in range(2):
            splitting.write(12)
            recorded.append((splitting.now_ms, *splitting.state()))
            splitting.now_ms += 10

    live()
    splitting.move("s00")
    live()
    splitting.split("s00", "s01", SLOTS // 2)
    live()
    splitting.move("s01")
    live()
    splitting.split("s01", "s02", 3 * SLOTS // 4)
    live()
    splitting.split("s00", "s03", SLOTS // 4)
    live()
    splitting.archive()

    for number, (until_ms, shards, content) in enumerate(recorded):
        parts, found = rebuilt(splitting.store, manifest, tmp_path / str(number), until_ms)
        assert found == content
        assert set(parts) >= set(shards)  # parts may be followed before they are written
    # Of other moments the seal that came next is there too: it has no time.
    assert parts == shards
    assert verify(splitting.store).is_good
    splitting.close()


def test_the_moment_of_a_split_itself_has_what_the_whole_had(
    splitting: Splitting, tmp_path: Path
) -> None:
    manifest = splitting.begin()
    splitting.write(9)
    moments = [(splitting.now_ms - 1, None), (splitting.now_ms, splitting.state()[1])]
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.now_ms += 50
    moments.append((splitting.now_ms - 20, moments[1][1]))
    splitting.write(9)
    splitting.archive()
    for until_ms, content in moments:
        parts, found = rebuilt(splitting.store, manifest, tmp_path / str(until_ms), until_ms)
        # What the whole has later shows that the moment was before; what parts lack shows nothing.
        assert list(parts) == (["s00"] if content is None else ["s00", "s01"])
        assert content in (None, found)
    splitting.close()


def test_what_only_a_part_of_a_part_has_is_not_missed(splitting: Splitting, tmp_path: Path) -> None:
    manifest = splitting.begin()
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.split("s01", "s02", 3 * SLOTS // 4)
    splitting.write(8, into="s02")
    splitting.archive()
    state = splitting.state()
    assert rebuilt(splitting.store, manifest, tmp_path, splitting.now_ms) == state
    splitting.close()


def test_a_moment_that_the_log_of_a_part_has_not_reached_is_refused(splitting: Splitting) -> None:
    """The other part has no writes and is archived: that says nothing of this one."""
    splitting.begin()
    splitting.split("s00", "s01", SLOTS // 2)
    moment_ms = splitting.now_ms
    splitting.write(8, into="s01")
    splitting.archive()
    archive = Archive(splitting.store, CLUSTER)
    for segment in archive.segments("s01"):
        splitting.store.delete(segment.name)
    archive.append("s01", 2, [splitting.first_of["s01"]], (SLOTS // 2, SLOTS))
    archive.mark("s01", Reached(2, splitting.first_of["s01"].index, moment_ms))
    faults = plan(splitting.store, until_ms=splitting.now_ms).faults
    assert [f for f in faults if f.startswith("the log of s01 was archived until")] == faults != []
    splitting.close()


def test_entries_that_a_leader_had_and_nobody_archived_are_told(splitting: Splitting) -> None:
    splitting.begin()
    splitting.write(5)
    last = splitting.shards["s00"].applied_index
    Archive(splitting.store, CLUSTER).mark("s00", Reached(1, last, END_MS))
    (fault,) = plan(splitting.store, until_ms=splitting.now_ms).faults
    assert fault == f"entries {last - 4} to {last} of s00 were never archived"
    splitting.close()


def test_the_missing_end_of_an_epoch_is_not_passed_over(
    splitting: Splitting, tmp_path: Path
) -> None:
    """The next epoch begins after the moment, and so does not say that something is missing."""
    manifest = splitting.begin()
    splitting.write(10)
    moment_ms = splitting.now_ms
    splitting.move("s00")
    splitting.now_ms += 50
    splitting.write(3)
    splitting.archive()
    archive = Archive(splitting.store, CLUSTER)
    archived = [(s, archive.read(s)) for s in archive.segments("s00", 1)]
    for segment, _ in archived:
        splitting.store.delete(segment.name)
    entries = [entry for _, contents in archived for entry in contents.entries]
    archive.append("s00", 1, entries[:5], (0, SLOTS))
    with pytest.raises(RestoreImpossible, match="lacks entries"):
        rebuilt(splitting.store, manifest, tmp_path, moment_ms, may_have_gaps=True)
    early_ms = moment_ms - 6  # a later write is there
    rebuilt(splitting.store, manifest, tmp_path / "early", early_ms, may_have_gaps=True)
    splitting.close()


def test_clocks_that_differ_between_the_whole_and_a_part(
    splitting: Splitting, tmp_path: Path
) -> None:
    """The first write after the backup is from a clock that is ahead: the moment is before it."""
    manifest = splitting.begin()
    content = splitting.state()[1]
    now_ms = splitting.now_ms
    splitting.now_ms += 1_000
    splitting.write(1)
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.now_ms = now_ms + 100
    splitting.write(4)
    splitting.archive()
    parts, found = rebuilt(splitting.store, manifest, tmp_path, splitting.now_ms)
    assert (list(parts), found) == (["s00"], content)
    splitting.close()


@pytest.mark.parametrize("splitting", range(100, 106), indirect=True)
def test_any_moment_of_any_history(splitting: Splitting, tmp_path: Path) -> None:
    chance = splitting.chance
    manifest = splitting.begin()
    recorded = []
    for _ in range(12):
        name = chance.choice(sorted(splitting.shards))
        start, end = splitting.slots[name]
        what = chance.random()
        if what < 0.3 and end - start >= 2_048:
            at = chance.randrange(start + 512, end - 512)
            splitting.split(name, f"s{len(splitting.shards):02d}", at)
        elif what < 0.5:
            splitting.move(name)
        else:
            splitting.write(chance.randint(1, 6), into=chance.choice([name, None]))
            recorded.append((splitting.now_ms, splitting.state()[1]))
            splitting.now_ms += chance.choice([0, 7])
    splitting.archive()
    for number, (until_ms, content) in enumerate(recorded):
        _, found = rebuilt(splitting.store, manifest, tmp_path / str(number), until_ms)
        assert found == content, number
    splitting.close()


def test_a_part_whose_log_is_missing_is_named(splitting: Splitting, tmp_path: Path) -> None:
    manifest = splitting.begin()
    splitting.write(5)
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.write(30)
    splitting.archive()
    store, archive = splitting.store, Archive(splitting.store, CLUSTER)
    until_ms = splitting.now_ms

    with pytest.raises(RestoreImpossible, match=r"was split at entry \d+: by then it is s00, s01"):
        fetch_shard(store, manifest, "s00", tmp_path / "one", until_ms=until_ms)

    segments = archive.segments("s01")
    store.delete(segments[0].name)
    found = plan(store, until_ms=until_ms)
    assert any("the part with slots 8192 to 16383 was not archived" in f for f in found.faults)
    assert not (tmp_path / "one").exists()
    splitting.close()


def test_a_fetch_of_a_part_that_was_interrupted_is_done_again(
    splitting: Splitting, tmp_path: Path
) -> None:
    manifest = splitting.begin()
    splitting.write(5)
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.write(30)
    splitting.archive()
    store, until_ms = splitting.store, splitting.now_ms
    last = Archive(store, CLUSTER).segments("s01")[-1]
    kept = store.get(last.name)
    (lineage,) = [one.lineage for one in plan(store, until_ms=until_ms).shards if one.id == "s01"]

    def fetch() -> Fetched:
        return fetch_shard(
            store,
            manifest,
            "s00",
            tmp_path / "part",
            until_ms=until_ms,
            lineage=lineage,
            map_bytes=MAP_BYTES,
        )

    store.put(last.name, kept[:-1])
    with pytest.raises(BackupDamaged, match="checksum"):
        fetch()
    store.put(last.name, kept)
    fetched = fetch()
    shard = splitting.shards["s01"]
    assert (fetched.applied_index, fetched.digest) == (shard.applied_index, shard.digest())
    splitting.close()


def test_the_log_of_a_part_is_kept_for_a_backup_from_before_the_split(
    splitting: Splitting, tmp_path: Path
) -> None:
    manifest = splitting.begin()
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.write(20)
    shards, content = splitting.state()
    until_ms = splitting.now_ms
    splitting.archive()
    after = SmallCluster(tmp_path / "after", 2)  # its shards are called the same
    for shard in after.open.values():
        shard.close()
    after.open = splitting.shards
    after.backup(splitting.store, END_MS - 1)

    before = [s.name for s in Archive(splitting.store, CLUSTER).segments("s01")]
    prune(splitting.store, keep=2, now_ms=lambda: END_MS, token="t")
    assert [s.name for s in Archive(splitting.store, CLUSTER).segments("s01")] == before
    assert rebuilt(splitting.store, manifest, tmp_path / "back", until_ms) == (shards, content)
    prune(splitting.store, keep=1, now_ms=lambda: END_MS, token="t")
    left = Archive(splitting.store, CLUSTER).segments("s01")
    assert [s for s in left if s.last <= shards["s01"][0]] == []
    assert all(isinstance(segment, Segment) for segment in left)
    splitting.close()
