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
from agentmem_node.backup.errors import RestoreImpossible
from agentmem_node.backup.fetch import fetch_shard, plan
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

USERS = tuple(f"user{number}" for number in range(24))
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
    now_ms: int = START_MS
    kept: list[tuple[str, object, int]] = field(default_factory=list)

    def begin(self) -> Manifest:
        """One shard, a backup of it, and some writes before that."""
        small = SmallCluster(self.folder / "whole", 1)
        self._take("s00", small.open["s00"], (0, SLOTS), 1)
        self.write(20)
        made = small.backup(self.store, self.now_ms)
        self.logs.clear()
        return made

    def _take(self, name: str, shard: Shard, slots: tuple[int, int], epoch: int) -> None:
        self.shards[name], self.slots[name], self.epochs[name] = shard, slots, epoch

    def write(self, count: int) -> None:
        for _ in range(count):
            self.now_ms += 1
            if self.kept and self.chance.random() < 0.4:
                user, op, version = self.kept.pop(self.chance.randrange(len(self.kept)))
                if self.chance.random() < 0.4:
                    made = delete(op)  # type: ignore[arg-type]
                else:
                    made = update(op, version + 1, f"version {version + 1} of it", user)  # type: ignore[arg-type]
                    self.kept.append((user, op, version + 1))
            else:
                user = self.chance.choice(USERS)
                made = add(self.now_ms - START_MS, f"memory {self.now_ms} of {user}", user)
                self.kept.append((user, made, 1))
            slot = slot_of("acme", f"user:{user}")
            name = next(n for n, (a, b) in self.slots.items() if a <= slot < b)
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
            self._apply(part, Entry(index + 1, 2, control(Begin(epoch))))

    def archive(self) -> None:
        archive = Archive(self.store, CLUSTER)
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


@pytest.fixture
def splitting(tmp_path: Path, request: pytest.FixtureRequest) -> Splitting:
    chance = random.Random(getattr(request, "param", 1))
    return Splitting(tmp_path / "shards", open_store(str(tmp_path / "store")), chance)


def rebuilt(
    store: ObjectStore, manifest: Manifest, folder: Path, until_ms: int
) -> tuple[dict[str, tuple[int, bytes]], Content]:
    found = plan(store, backup_id=manifest.id, until_ms=until_ms)
    assert found.faults == []
    assert [gap for shard in found.shards for gap in shard.gaps] == []
    parts, contents = {}, []
    for shard in found.shards:
        fetched = fetch_shard(
            store,
            manifest,
            shard.in_backup,
            folder / shard.id,
            until_ms=until_ms,
            part=shard.id,
            map_bytes=MAP_BYTES,
        )
        parts[shard.id] = (fetched.applied_index, fetched.digest)
        contents.append(fetched.content)
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
        assert set(parts) == set(shards)
    # Of other moments the seal that came next is there too: it has no time.
    assert parts == shards
    assert verify(splitting.store).is_good
    splitting.close()


def test_the_moment_of_a_split_itself_is_the_whole(splitting: Splitting, tmp_path: Path) -> None:
    """Nothing was written to the parts by then: the whole has all that they have."""
    manifest = splitting.begin()
    splitting.write(9)
    before_ms = splitting.now_ms
    content = splitting.state()[1]
    splitting.split("s00", "s01", SLOTS // 2)
    splitting.now_ms += 50
    splitting.write(9)
    splitting.archive()
    for until_ms in (before_ms, before_ms + 20):
        parts, found = rebuilt(splitting.store, manifest, tmp_path / str(until_ms), until_ms)
        assert (list(parts), found) == (["s00"], content)
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
    with pytest.raises(RestoreImpossible, match="has not become s07 by then"):
        fetch_shard(store, manifest, "s00", tmp_path / "one", until_ms=START_MS + 21, part="s07")

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
    store.put(last.name, kept[:-1])
    with pytest.raises(Exception, match="checksum"):
        fetch_shard(
            store, manifest, "s00", tmp_path / "part", until_ms=until_ms, part="s01",
            map_bytes=MAP_BYTES,
        )  # fmt: skip
    store.put(last.name, kept)
    fetched = fetch_shard(
        store, manifest, "s00", tmp_path / "part", until_ms=until_ms, part="s01",
        map_bytes=MAP_BYTES,
    )  # fmt: skip
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
