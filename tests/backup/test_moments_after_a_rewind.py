"""Any moment after the oldest backup, although the cluster was taken back since: moments before
that have what was there then, moments after it what came of the state that it was taken back to."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentmem_cluster.epochs.commands import Begin
from agentmem_cluster.epochs.commands import encode as control
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.backup.archive import Archive
from agentmem_node.backup.catalog import new_id
from agentmem_node.backup.content import Content
from agentmem_node.backup.errors import BackupDamaged
from agentmem_node.backup.fetch import fetch_shard, plan
from agentmem_node.backup.manifest import Manifest, Model, encode, manifest_name
from agentmem_node.backup.objects import open_store
from agentmem_node.backup.origin import Origin
from agentmem_node.backup.origin import encode as origin_entry
from agentmem_node.backup.prune import prune
from agentmem_node.backup.upload import Progress, RateLimit, upload_shard
from agentmem_node.backup.verify import verify
from agentmem_node.engine.shard import Shard
from tests.backup.making import CLUSTER, DIM, MAP_BYTES
from tests.backup.test_moments_after_a_split import SLOTS, Splitting, rebuilt


@dataclass
class Rewinding(Splitting):
    """Shards that are also backed up and taken back, as the real cluster does it."""

    rewinds: int = 0
    recorded: list[tuple[int, dict[str, tuple[int, bytes]], Content]] = field(default_factory=list)

    def back_up(self) -> Manifest:
        self.now_ms += 1
        made = []
        for name, shard in self.shards.items():
            snapshot = shard.open_snapshot()
            made.append(
                upload_shard(
                    self.store,
                    snapshot,
                    shard._store.env.db,
                    shard=name,
                    epoch=self.epochs[name],
                    term=1,
                    known=frozenset(),
                    replace=False,
                    progress=Progress(),
                    rate=RateLimit(0),
                )
            )
            snapshot.close()
        infos = {
            name: ShardInfo(name, self.epochs[name], ("n1",), "n1", *self.slots[name])
            for name in self.shards
        }
        manifest = Manifest(
            id=new_id(self.now_ms, (self.now_ms % (1 << 24)).to_bytes(3, "big")),
            cluster_id=self.cluster_id,
            cluster_name="test",
            version="0",
            at_ms=self.now_ms,
            took_ms=0,
            model=Model(name="none", dim=DIM, model_hash=""),
            map=ShardMap(1, infos).to_wire(),
            shards=made,
        )
        self.store.put(manifest_name(manifest.id), encode(manifest))
        return manifest

    def take_back(
        self, manifest: Manifest, until_ms: int | None = None, clock_ms: int | None = None
    ) -> None:
        """Every shard in turn. `clock_ms`: what the clock of the next epoch's leader shows."""
        self.archive()
        planned = plan(self.store, backup_id=manifest.id, until_ms=until_ms)
        assert planned.faults == []
        ends = {shard.id: shard.end for shard in planned.shards}
        for name in list(self.shards):
            self.now_ms += 1
            self.rewinds += 1
            folder = self.folder / f"{name}-back-{self.rewinds}"
            upto = None if until_ms is None else ends[name]
            fetch_shard(
                self.store,
                manifest,
                name,
                folder,
                until_ms=until_ms,
                upto=upto,
                map_bytes=MAP_BYTES,
            )
            if self.chance.random() < 0.5:
                self.write(2, into=name)  # they are undone, and so is their log
            sealed = self._seal(name)
            self.archive()
            self.shards[name].close()
            shard = Shard.open(folder, name, dim=DIM, map_size=MAP_BYTES)
            digest = shard.digest()
            base = max(sealed, shard.applied_index) + 1
            shard.rebase(base, self.epochs[name])
            epoch = self.epochs[name] + 1
            self._take(name, shard, self.slots[name], epoch)
            at_ms = self.now_ms if clock_ms is None else clock_ms
            origin = Origin(epoch, manifest.id, until_ms, upto, at_ms, digest)
            for command in (b"", origin_entry(origin), control(Begin(epoch))):
                self._apply(name, Entry(shard.applied_index + 1, 3, command))
            self.archive()
            self.now_ms += 3

    def goes_on_from(self, manifest: Manifest, folder: Path) -> None:
        """What is written now, too, can be restored from a backup, by the log."""
        self.write(8)
        self.record()
        self.archive()
        until_ms, shards, content = self.recorded[-1]
        assert rebuilt(self.store, manifest, folder, until_ms) == (shards, content)

    def record(self) -> None:
        self.recorded.append((self.now_ms, *self.state()))
        self.now_ms += 10


@pytest.fixture
def rewinding(tmp_path: Path, request: pytest.FixtureRequest) -> Rewinding:
    chance = random.Random(getattr(request, "param", 1))
    return Rewinding(tmp_path / "shards", open_store(str(tmp_path / "store")), chance)


def test_moments_before_and_after_a_rewind_are_all_there(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    for _ in range(3):
        rewinding.write(8)
        rewinding.record()
    second = rewinding.back_up()
    for _ in range(2):
        rewinding.write(8)
        rewinding.record()
    middle_ms = rewinding.recorded[1][0]
    rewinding.take_back(second)
    rewinding.record()  # nothing was written since
    rewinding.write(8)
    rewinding.record()
    rewinding.take_back(first, middle_ms)  # to a moment of the log, before the rewind
    rewinding.write(8)
    rewinding.record()
    rewinding.archive()
    for number, (until_ms, shards, content) in enumerate(rewinding.recorded):
        for manifest in (first, second) if until_ms > second.at_ms else (first,):
            folder = tmp_path / f"{number}-{manifest.id}"
            parts, found = rebuilt(rewinding.store, manifest, folder, until_ms)
            assert found == content
            assert set(parts) == set(shards)
            assert not list(folder.glob("*"))  # nothing of how it was made is left
    assert parts == shards
    checked = verify(rewinding.store)
    assert checked.is_good and not checked.gaps
    rewinding.close()


def test_a_moment_without_the_backup_that_was_taken_back_to_is_refused(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.record()
    second = rewinding.back_up()
    rewinding.write(8)
    rewinding.take_back(second)
    rewinding.write(8)
    rewinding.record()
    rewinding.archive()
    rewinding.store.delete(manifest_name(second.id))
    (before_ms, shards, _), (after_ms, _, _) = rewinding.recorded
    (fault,) = plan(rewinding.store, until_ms=after_ms).faults
    assert f"was taken back to backup {second.id}" in fault
    assert rebuilt(rewinding.store, first, tmp_path, before_ms)[0] == shards
    rewinding.close()


def test_a_backup_that_was_taken_back_to_is_kept_while_an_older_state_needs_it(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    second = rewinding.back_up()  # from before the rewind, and not what it went back to
    rewinding.write(8)
    rewinding.take_back(first)
    rewinding.write(8)
    rewinding.record()
    rewinding.archive()

    def pruned(keep: int) -> list[str]:
        done = prune(
            rewinding.store, keep, now_ms=lambda: rewinding.now_ms, token="t", grace_ms=-(1 << 40)
        )
        return done.kept

    assert pruned(1) == [first.id, second.id]
    until_ms, shards, content = rewinding.recorded[0]
    assert rebuilt(rewinding.store, second, tmp_path, until_ms) == (shards, content)
    # A beginning that cannot be read keeps nothing, and hinders nobody.
    archive = Archive(rewinding.store, CLUSTER)
    (begun,) = archive.segments("s00", 2)[:1]
    whole = rewinding.store.get(begun.name)
    rewinding.store.put(begun.name, whole[:-1] + b"x")
    with pytest.raises(BackupDamaged):
        list(archive.rewinds("s00", 1))
    assert list(archive.rewinds("s00", 1, legible=True)) == []
    rewinding.store.put(begun.name, whole)
    third = rewinding.back_up()
    assert pruned(1) == [third.id]
    rewinding.close()


def test_what_it_was_taken_back_to_must_have_the_digest_of_then(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.archive()
    sealed = rewinding._seal("s00")
    rewinding.archive()
    origin = Origin(2, first.id, None, None, rewinding.now_ms, b"x" * 32)
    rewinding._take("s00", rewinding.shards["s00"], (0, SLOTS), 2)
    rewinding.logs["s00", 2] = [
        Entry(sealed + 2, 2, origin_entry(origin)),
        Entry(sealed + 3, 2, control(Begin(2))),
    ]
    rewinding.archive()
    with pytest.raises(BackupDamaged, match="another digest"):
        fetch_shard(
            rewinding.store,
            first,
            "s00",
            tmp_path / "s00",
            until_ms=rewinding.now_ms + 5,
            map_bytes=MAP_BYTES,
        )
    rewinding.close()


def test_a_shard_that_was_idle_since_the_moment_it_was_taken_back_to(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    """Nothing in the log says where that moment ends: only up to which entry it was planned."""
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.record()
    moment_ms = rewinding.recorded[0][0]
    rewinding.now_ms += 1_000
    rewinding.take_back(first, moment_ms)
    rewinding.goes_on_from(first, tmp_path)
    rewinding.close()


def test_a_leader_whose_clock_is_behind_makes_no_rewind_its_own_origin(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.record()
    moment_ms = rewinding.recorded[0][0]
    rewinding.now_ms += 1_000
    rewinding.write(3)
    rewinding.take_back(first, moment_ms, clock_ms=moment_ms - 50)
    rewinding.goes_on_from(first, tmp_path)
    rewinding.close()


def test_a_cluster_that_was_taken_back_to_the_backup_of_another(tmp_path: Path) -> None:
    """Say, of the one that it replaced: that one's log is not its own."""
    store = open_store(str(tmp_path / "store"))
    old = Rewinding(tmp_path / "old", store, random.Random(5))
    theirs = old.begin()
    old.write(40)
    old.archive()
    new = Rewinding(
        tmp_path / "new", store, random.Random(6), now_ms=old.now_ms + 9_000, cluster_id="b0b"
    )
    mine = new.begin()
    new.write(8)
    new.take_back(theirs)
    new.write(8)
    new.record()
    new.archive()
    until_ms, shards, content = new.recorded[-1]
    assert rebuilt(store, mine, tmp_path / "back", until_ms) == (shards, content)
    old.back_up()
    kept = prune(store, 1, now_ms=lambda: new.now_ms, token="t", grace_ms=-(1 << 40)).kept
    assert theirs.id in kept
    assert rebuilt(store, mine, tmp_path / "again", until_ms) == (shards, content)
    old.close()
    new.close()


def test_a_plan_says_what_is_missing_of_what_was_taken_back_to(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.archive()
    rewinding.write(8)
    rewinding.record()
    rewinding.write(3)
    rewinding.take_back(first, rewinding.recorded[0][0])
    rewinding.write(8)
    rewinding.record()
    rewinding.archive()
    until_ms = rewinding.recorded[-1][0]
    assert plan(rewinding.store, until_ms=until_ms).faults == []
    lost = Archive(rewinding.store, CLUSTER).segments("s00", 1)[0]
    rewinding.store.delete(lost.name)
    (fault,) = plan(rewinding.store, until_ms=until_ms).faults
    assert f"entries {lost.first} to {lost.last} after that are missing" in fault
    rewinding.close()


def test_a_gap_behind_the_moment_that_was_gone_back_to_is_of_no_matter(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    first = rewinding.begin()
    rewinding.write(8)
    rewinding.record()
    rewinding.write(4)
    rewinding.archive()
    rewinding.write(5)
    rewinding.logs["s00", 1].clear()  # thrown away before it was archived
    rewinding.write(5)
    rewinding.take_back(first, rewinding.recorded[0][0])
    rewinding.goes_on_from(first, tmp_path)
    rewinding.close()


def test_what_a_leader_had_under_way_behind_a_seal_ends_no_moment(
    rewinding: Rewinding, tmp_path: Path
) -> None:
    """It is archived, and the next epoch has fewer entries than that: they are not missing."""
    first = rewinding.begin()
    rewinding.write(8)
    moment_ms = rewinding.now_ms
    seal = rewinding._seal("s00")
    for index in range(seal + 1, seal + 6):
        rewinding.logs["s00", 1].append(Entry(index, 1, b""))

    def fetched(name: str) -> int:
        rewinding.archive()
        (planned,) = plan(rewinding.store, until_ms=moment_ms).shards
        made = fetch_shard(
            rewinding.store,
            first,
            "s00",
            tmp_path / name,
            until_ms=moment_ms,
            upto=planned.end,
            map_bytes=MAP_BYTES,
        )
        assert made.applied_index == planned.end
        return planned.end

    assert fetched("sealed") == seal
    rewinding.epochs["s00"] = 2
    rewinding._apply("s00", Entry(seal + 1, 2, b""))
    rewinding._apply("s00", Entry(seal + 2, 2, control(Begin(2))))
    assert fetched("begun") == seal + 2
    rewinding.close()


@pytest.mark.parametrize("rewinding", [*range(200, 212), 363, 377], indirect=True)
def test_any_moment_of_any_history(rewinding: Rewinding, tmp_path: Path) -> None:
    chance = rewinding.chance
    backups = [rewinding.begin()]
    for turn in range(14):
        name = chance.choice(sorted(rewinding.shards))
        start, end = rewinding.slots[name]
        what = chance.random() if turn < 13 else 0.6
        if what < 0.15 and end - start >= 2_048:
            at = chance.randrange(start + 512, end - 512)
            rewinding.split(name, f"s{len(rewinding.shards):02}", at)
        elif what < 0.3:
            rewinding.move(name)
        elif what < 0.45:
            backups.append(rewinding.back_up())
        elif what < 0.7:
            now = {(n, *s) for n, s in rewinding.slots.items()}
            fitting = [m for m in backups if _shape(m) == now]
            if not fitting:
                fitting = [rewinding.back_up()]
                backups += fitting
                rewinding.write(5)
            manifest = chance.choice(fitting)
            # Only a moment at which it had the shards that it has now is a way back.
            late = [t for t, shards, _ in rewinding.recorded if t > manifest.at_ms]
            late = [t for t in late if _shards_at(rewinding, t) == set(rewinding.shards)]
            until_ms = chance.choice([None, *late])
            rewinding.take_back(manifest, until_ms)
        rewinding.write(chance.randint(1, 12))
        rewinding.record()
    rewinding.archive()
    for number, (until_ms, shards, content) in enumerate(rewinding.recorded):
        able = [m for m in backups if m.at_ms < until_ms]
        for manifest in {able[0].id: able[0], able[-1].id: able[-1]}.values():
            folder = tmp_path / f"{number}-{manifest.id}"
            parts, found = rebuilt(rewinding.store, manifest, folder, until_ms)
            assert found == content, (rewinding.recorded[number][0], manifest.id)
            assert set(parts) >= set(shards)
            shutil.rmtree(folder, ignore_errors=True)
    assert rewinding.rewinds
    assert parts == shards
    assert verify(rewinding.store).is_good
    rewinding.close()


def _shape(manifest: Manifest) -> set[tuple[str, int, int]]:
    infos = manifest.shard_map.shards.values()
    return {(info.id, info.slot_start, info.slot_end) for info in infos}


def _shards_at(rewinding: Rewinding, until_ms: int) -> set[str]:
    return next(set(shards) for t, shards, _ in rewinding.recorded if t == until_ms)
