"""Backups of a simulated world's shards, and what they must come to at any later moment.

Snapshots are taken of replicas as the world runs, whoever moves, dies or loses its disk meanwhile;
what the replicas applied is the archived log. The real code uploads, plans, fetches and replays;
the digest must be the one that replicas had at that very entry.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from agentmem_chaos.sim.moves import newest
from agentmem_chaos.sim.moving_node import MovingNode
from agentmem_chaos.sim.shard_store import DIM, ShardStore
from agentmem_chaos.sim.world import World
from agentmem_cluster.epochs.commands import Seal, decode
from agentmem_cluster.raft.api import Entry
from agentmem_node.backup.archive import Archive, Lineage, Reached, at_ms_of
from agentmem_node.backup.catalog import new_id
from agentmem_node.backup.fetch import ShardPlan, fetch_shard, plan
from agentmem_node.backup.manifest import Manifest, Model, ShardBackup, encode, manifest_name
from agentmem_node.backup.objects import ObjectStore
from agentmem_node.backup.upload import Progress, RateLimit, upload_shard

CLUSTER = "51a51a"
SEGMENT_ENTRIES_MAX = 40
MAP_BYTES = 256 << 20
_FOR_EVER_MS = 1 << 52


@dataclass(slots=True)
class Restored:
    """How much was compared. `exact`: with the digest of a replica at that entry."""

    backups: int = 0
    moments: int = 0
    exact: int = 0
    epochs: int = 0  # the most that a restore went through
    splits: int = 0  # and the most of them that were splits


class WorldBackups:
    """Takes backups while a world runs; `check` restores them when it has ended."""

    def __init__(self, world: World, store: ObjectStore, chance: random.Random) -> None:
        self._world = world
        self._store = store
        self._chance = chance
        self.manifests: list[Manifest] = []

    def take_at(self, seconds: float) -> None:
        self._world.schedule.after(seconds, self._take)

    def _take(self) -> None:
        """Of one replica of each shard, if each has one that serves now."""
        nodes = list(self._world.movers.values())
        state = newest(nodes)
        if state is None or state.map is None:
            return
        made = []
        for shard, info in state.map.shards.items():
            serving = [n for n in nodes if n.alive and n.is_whole(shard, info.epoch)]
            if not serving:
                return
            made.append(self._upload(shard, info.epoch, self._chance.choice(serving)))
        at_ms = max(shard.newest_ms for shard in made)
        number = len(self.manifests)
        manifest = Manifest(
            id=new_id(max(0, at_ms), number.to_bytes(3, "big")),
            cluster_id=CLUSTER,
            cluster_name="simulated",
            version="0",
            at_ms=at_ms,
            took_ms=0,
            model=Model(name="none", dim=DIM, model_hash=""),
            map=state.map.to_wire(),
            shards=made,
        )
        self._store.put(manifest_name(manifest.id), encode(manifest))
        self.manifests.append(manifest)

    def _upload(self, shard: str, epoch: int, node: MovingNode) -> ShardBackup:
        store = node.store_of(shard, node.folder_of(shard))
        assert isinstance(store, ShardStore)
        snapshot = store.open_snapshot()
        try:
            return upload_shard(
                self._store,
                snapshot,
                store.databases,
                shard=shard,
                epoch=epoch,
                term=1,
                known=frozenset(),
                replace=False,
                progress=Progress(),
                rate=RateLimit(0),
            )
        finally:
            snapshot.close()

    # -- when the world has ended ----------------------------------------------------------------

    def check(self, folder: Path, moments: int) -> Restored:
        """Restore every backup as it is, and at some later moments. Raises AssertionError."""
        restored = Restored(backups=len(self.manifests))
        self._archive()
        for manifest in self.manifests:
            for shard in manifest.shards:
                whole = folder / f"{manifest.id}-{shard.id}"
                fetched = fetch_shard(self._store, manifest, shard.id, whole, map_bytes=MAP_BYTES)
                self._compare(shard.id, fetched.applied_index, fetched.digest, restored)
            logs = map(self._log_of, self._shards())
            times = {at_ms_of(entry.command) for log in logs for entry in log}
            later = sorted(ms for ms in times if ms is not None and ms >= manifest.at_ms)
            for until_ms in self._chance.sample(later, min(moments, len(later))):
                found = plan(self._store, backup_id=manifest.id, until_ms=until_ms)
                assert found.faults == []
                assert not any(part.gaps for part in found.shards)
                for part in found.shards:
                    where = folder / f"{manifest.id}-{part.id}-{until_ms}-{restored.moments}"
                    self._restore(manifest, part, until_ms, where, restored)
        return restored

    def _restore(
        self, manifest: Manifest, part: ShardPlan, until_ms: int, folder: Path, restored: Restored
    ) -> None:
        """At a moment: up to the last write of then, and as some replica was there."""
        backed_up = manifest.shard(part.in_backup)
        fetched = fetch_shard(
            self._store,
            manifest,
            part.in_backup,
            folder,
            until_ms=until_ms,
            lineage=part.lineage,
            map_bytes=MAP_BYTES,
        )
        since = backed_up.applied_index
        log = self._log_of_lineage(part.lineage, since)
        clock = [backed_up.newest_ms, *_clock_of(log, backed_up.newest_ms)]
        end = max(number for number, ms in enumerate(clock) if ms <= until_ms)
        # What follows the last write has no time, and may be there or not.
        last = fetched.applied_index - since
        assert clock[last] == clock[end] and last <= end, (part.id, until_ms)
        self._compare(part.id, fetched.applied_index, fetched.digest, restored)
        restored.epochs = max(restored.epochs, sum(map(_is_seal, log[:last])))
        restored.splits = max(restored.splits, len(part.lineage) - 1)
        restored.moments += 1

    def _compare(self, shard: str, index: int, digest: bytes, restored: Restored) -> None:
        # Where a shard was split there are two: that of the whole, and that of the part.
        there = {
            self._world.judge.state_at(shard, index),
            self._world.epochs.state_at(shard, index, len(digest)),
        } - {None}
        if there:
            said = f"{shard} was restored to another state at {index}"
            assert any(one is not None and one.startswith(digest) for one in there), said
            restored.exact += 1

    def _shards(self) -> list[str]:
        state = newest(list(self._world.movers.values()))
        assert state is not None and state.map is not None
        return sorted(state.map.shards)

    def _archive(self) -> None:
        """Archive what the replicas applied, in segments as leaders would write them."""
        archive = Archive(self._store, CLUSTER)
        for shard in self._shards():
            epoch, first_index = self._world.epochs.first_of(shard)
            part = list[Entry]()
            log = self._log_of(shard)
            for entry in [*log, None]:
                is_over = entry is None or len(part) >= self._chance.randint(1, SEGMENT_ENTRIES_MAX)
                if part and (is_over or _is_seal(part[-1])):
                    archive.append(shard, epoch, part, self._world.epochs.slots_of(shard, epoch))
                    epoch += _is_seal(part[-1])
                    part = []
                if entry is not None:
                    part.append(entry)
            archive.mark(shard, Reached(epoch, first_index + len(log) - 1, _FOR_EVER_MS))

    def _log_of(self, shard: str) -> list[Entry]:
        """All that was applied of its own log."""
        log: list[Entry] = []
        for index in count(self._world.epochs.first_of(shard)[1]):
            applied = self._world.judge.entry_at(shard, index)
            if applied is None:
                return log
            log.append(applied)
        raise AssertionError("the log has no end")

    def _log_of_lineage(self, lineage: Lineage, since: int) -> list[Entry]:
        """What a part comes from, behind entry `since`: the whole's log, and then its own."""
        log: list[Entry] = []
        for number, part in enumerate(lineage):
            end = lineage[number + 1].base if number + 1 < len(lineage) else None
            log += [
                entry
                for entry in self._log_of(part.shard)
                if entry.index > since + len(log) and (end is None or entry.index <= end)
            ]
        return log


def _is_seal(entry: Entry) -> bool:
    return isinstance(decode(entry.command), Seal)


def _clock_of(log: list[Entry], newest_ms: int) -> list[int]:
    """The running maximum of the times that commands name, after each entry."""
    clock = []
    for entry in log:
        newest_ms = max(newest_ms, at_ms_of(entry.command) or newest_ms)
        clock.append(newest_ms)
    return clock
