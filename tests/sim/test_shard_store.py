"""What dies leaves a shard's files as its kernel or its disk would, and it starts on them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem_chaos.checker import GONE, Kind
from agentmem_chaos.sim.machine import Command, Effect
from agentmem_chaos.sim.shard_machine import COMPARED_EVERY, RefusedByShard, ShardMachine
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_cluster.errors import DiskFull
from agentmem_cluster.raft.api import Entry

AT_MS = 1_790_000_000_000


class Replica:
    """A shard machine on files, and what it told of each entry."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        self.full = False
        self.store = ShardStore(folder, "s00", random.Random(seed), lambda: self.full)
        self.told: dict[int, tuple[Effect, bytes | None]] = {}
        self.start()

    def start(self) -> None:
        self.machine = ShardMachine(self.store, self._observe)

    def _observe(self, entry: Entry, effect: Effect, digest: bytes | None) -> None:
        self.told[entry.index] = (effect, digest)

    def entry(self, command: Command, at_ms: int = AT_MS) -> Entry:
        return Entry(self.machine.applied_index + 1, 1, self.machine.encode(command, at_ms))

    def do(self, command: Command, at_ms: int = AT_MS) -> Effect:
        return self.machine.apply([self.entry(command, at_ms)])[0]

    def checkpoint(self) -> None:
        job = self.machine.checkpoint()
        assert job is not None
        job.run()
        self.machine.checkpoint_done(job)


def make(request: str, key: str, content: int) -> Command:
    return Command(request, Kind.CAS.value, key, (1, content))


def update(request: str, key: str, seen: tuple[int, int], content: int) -> Command:
    return Command(request, Kind.CAS.value, key, (seen[0] + 1, content), seen)


def delete(request: str, key: str, seen: tuple[int, int] | None) -> Command:
    return Command(request, Kind.DELETE.value, key, 0, seen)


def test_a_memory_is_made_changed_and_deleted_as_the_checker_thinks(tmp_path: Path) -> None:
    replica = Replica(tmp_path / "shard")
    assert replica.machine.read("m0.0") is None
    assert replica.do(make("c0-1", "m0.0", 7)) == Effect(True, 1, True, "c0-1")
    assert not replica.do(make("c0-2", "m0.0", 8)).ok
    assert replica.do(update("c0-3", "m0.0", (1, 7), 9)) == Effect(True, 2, True, "c0-3")
    assert replica.machine.read("m0.0") == (2, 9)
    assert not replica.do(delete("c0-4", "m0.0", (1, 7))).ok
    assert replica.do(delete("c0-5", "m0.0", None)).ok
    assert replica.machine.read("m0.0") is GONE
    assert not replica.do(make("c0-6", "m0.0", 7)).ok
    assert replica.machine.outcome("c0-3") == (True, 2)
    assert replica.machine.outcome("c0-9") is None
    replica.machine.close()


def test_a_retry_that_another_node_decided_later_is_answered_by_the_ledger(tmp_path: Path) -> None:
    replica = Replica(tmp_path / "shard")
    command = make("c0-1", "m0.0", 7)
    assert replica.do(command).fresh
    assert replica.do(command, AT_MS + 5_000) == Effect(True, 1, False, "c0-1")
    replica.machine.close()


def test_a_request_id_that_is_used_for_something_else_is_no_effect_but_an_error(
    tmp_path: Path,
) -> None:
    replica = Replica(tmp_path / "shard")
    replica.do(make("c0-1", "m0.0", 7))
    with pytest.raises(RefusedByShard):
        replica.do(make("c0-1", "m0.0", 8))
    replica.machine.close()


def test_a_full_disk_applies_nothing(tmp_path: Path) -> None:
    replica = Replica(tmp_path / "shard")
    replica.full = True
    with pytest.raises(DiskFull):
        replica.do(make("c0-1", "m0.0", 7))
    assert replica.machine.applied_index == 0
    replica.machine.close()


@pytest.mark.parametrize("death", ["kill", "power"])
def test_a_shard_starts_at_its_last_checkpoint_however_it_died(tmp_path: Path, death: str) -> None:
    for seed in range(12):
        replica = Replica(tmp_path / f"shard{seed}", seed)
        chance = random.Random(seed)
        contents = {0: replica.machine.contents()}
        for number in range(150):
            replica.do(make(f"c0-{number}", f"m{number}.0", number))
            contents[number + 1] = replica.machine.contents()
            if chance.random() < 0.02:
                replica.checkpoint()
        durable = replica.store.durable_index
        pending = replica.machine.checkpoint() if chance.random() < 0.5 else None
        if death == "kill":
            replica.store.kill(keeps_cached=False)
        else:
            replica.store.power_loss()
        replica.start()
        # The job under way may have been done just before.
        allowed = {durable} if pending is None else {durable, 150}
        assert replica.machine.applied_index in allowed
        assert replica.machine.applied_index == replica.store.durable_index
        assert replica.machine.contents() == contents[replica.machine.applied_index]
        replica.machine.close()


def test_replicas_are_equal_however_their_entries_were_cut_into_batches(tmp_path: Path) -> None:
    one, other = Replica(tmp_path / "a", 1), Replica(tmp_path / "b", 2)
    entries = [
        Entry(index, 1, one.machine.encode(make(f"c0-{index}", f"m{index}.0", index), AT_MS))
        for index in range(1, 2 * COMPARED_EVERY + 1)
    ]
    for entry in entries:
        one.machine.apply([entry])
    other.machine.apply(entries)
    assert one.told[COMPARED_EVERY] == other.told[COMPARED_EVERY]
    assert one.machine.digest() == other.machine.digest()
    assert one.machine.contents() == other.machine.contents()
    one.machine.close()
    other.machine.close()


def test_a_difference_in_what_is_stored_shows_in_the_contents(tmp_path: Path) -> None:
    one, other = Replica(tmp_path / "a"), Replica(tmp_path / "b")
    one.do(make("c0-1", "m0.0", 7), AT_MS)
    other.do(make("c0-1", "m0.0", 7), AT_MS + 1)
    assert one.machine.contents() != other.machine.contents()
    one.machine.close()
    other.machine.close()
