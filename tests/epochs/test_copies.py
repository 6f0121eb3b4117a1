"""What becomes of a node's copies when it restarts, falls behind, or a change is given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentmem_cluster.epochs.change import Base, Change
from agentmem_cluster.epochs.commands import EpochState, Seal, decode, encode
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet, Staged
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.raft.api import Entry, GroupSpec
from agentmem_cluster.realtime import RealDisk
from agentmem_cluster.shardmap import ShardInfo, ShardMap

SLOTS = 16_384
OLD = ShardInfo("s00", 1, ("n1", "n2", "n3"), "n1", 0, SLOTS)
NEW = ShardInfo("s00", 2, ("n4", "n5", "n6"), "n4", 0, SLOTS)
MOVE = Change("c1", "s00", 1, OLD.members, (NEW,))
BASE = Base(10, 3)
BEFORE, AFTER = ShardMap(1, {"s00": OLD}), ShardMap(2, {"s00": NEW})


@dataclass
class State:
    """A state machine that is durable at once."""

    applied_index: int = 0
    epoch_state: EpochState = field(default_factory=EpochState)

    @property
    def durable_index(self) -> int:
        return self.applied_index

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        for entry in entries:
            control = decode(entry.command)
            if control is not None:
                self.epoch_state = self.epoch_state.after(control)
            self.applied_index = entry.index
        return [None] * len(entries)

    def checkpoint(self) -> None:
        return None

    def checkpoint_done(self, job: Any) -> None:
        raise AssertionError("there was no checkpoint")

    def digest(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


@dataclass
class World:
    """The disk of one node: what is here outlives a restart."""

    folder: Path
    states: dict[str, State] = field(default_factory=dict)
    specs: list[GroupSpec] = field(default_factory=list)
    leader: str | None = None

    def start(self, node: str = "n4") -> ReplicaSet:
        disk = RealDisk(self.folder)
        record = LocalRecord.load(disk) or LocalRecord("one", is_admitted=True)
        found = ReplicaSet(node, disk, record, self, self)
        for shard in list(record.ready):
            found.reopen(shard)
        for folder in set(self.states) - found.folders_in_use():
            del self.states[folder]  # as a node tidies up
        return found

    def open(self, shard: str, folder: str) -> State:
        return self.states.setdefault(folder, State())

    def release(self, shard: str, folder: str, state: Any) -> None:
        self.states.pop(folder)

    def rebase(self, state: Any, index: int, ended: int) -> None:
        raise AssertionError("nothing is restored here")

    def add_group(self, spec: GroupSpec, machine: Any) -> None:
        self.specs.append(spec)

    def remove_group(self, group_id: str) -> None: ...
    def drop_log(self, group_id: str, epoch: int) -> None: ...
    def checkpoint_soon(self, group_id: str) -> None: ...
    def status(self, group_id: str) -> Any:
        return SimpleNamespace(applied_index=BASE.index, leader=self.leader, needs_reseed=False)

    def term_at(self, group_id: str, index: int) -> int:
        return BASE.term

    def copy(self, replicas: ReplicaSet, info: ShardInfo, *, sealed: bool = True) -> Staged:
        staged = replicas.begin_copy(info, "c1", 1)
        staged.machine = EpochMachine(self.open(info.id, staged.folder), 1)
        command = encode(Seal(1)) if sealed else b"x"
        staged.machine.apply([Entry(BASE.index, BASE.term, command)])
        staged.last_term = BASE.term
        if sealed:
            replicas.complete(staged)
        return staged


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_epoch_that_was_founded_on_copies_finds_them_after_a_power_loss(world: World) -> None:
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    world.copy(replicas, NEW)
    # All of its members go down before they hear that the epoch was founded.
    replicas = world.start()
    replicas.learn(BEFORE, {}, 3)  # a view kept from before the change: nobody asks for the copy
    assert not replicas.drop_copies(list(replicas.staged.values()))
    report = replicas.report(MOVE)
    assert report.staged["s00"].seal == (BASE.index, BASE.term)
    replicas.learn(AFTER, {"s00": MOVE.founded(BASE)}, 6)
    assert replicas.served["s00"].info == NEW
    assert world.specs[-1].base_index == BASE.index
    assert world.states[replicas.served["s00"].folder].applied_index == BASE.index
    assert not replicas.record.ready and LocalRecord.load(RealDisk(world.folder)).ready == {}  # type: ignore[union-attr]


def test_a_copy_whose_change_was_given_up_is_forgotten_on_disk_first(world: World) -> None:
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    staged = world.copy(replicas, NEW)
    replicas.learn(BEFORE, {}, 6)
    assert replicas.drop_copies([staged]) == [staged]
    assert not world.start().staged


def test_a_copy_whose_folder_was_lost_is_not_taken_for_the_final_state(world: World) -> None:
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    world.copy(replicas, NEW)
    world.states.clear()
    replicas = world.start()
    replicas.learn(AFTER, {"s00": MOVE.founded(BASE)}, 6)
    assert not replicas.served and replicas.wanted() == [NEW]


def test_a_copy_that_fails_after_the_founding_is_wanted_again(world: World) -> None:
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    staged = world.copy(replicas, NEW, sealed=False)
    staged.state = Staging.FOLLOWING
    replicas.learn(AFTER, {"s00": MOVE.founded(BASE)}, 6)
    assert replicas.wanted() == []  # it may yet come to the seal
    staged.state = Staging.FAILED  # whom it followed has left the old epoch
    assert replicas.wanted() == [NEW]


def test_a_copy_that_comes_after_its_change_has_ended_is_made_anew(world: World) -> None:
    """The others began and finished without this node: where its log begins is not known now."""
    replicas = world.start()
    replicas.learn(BEFORE, {"s00": MOVE}, 5)
    world.copy(replicas, NEW)
    replicas.learn(AFTER, {}, 9)
    assert not replicas.served
    assert replicas.wanted() == [NEW]


def test_a_part_of_a_split_that_was_given_up_is_no_replica_of_the_whole(world: World) -> None:
    """A seal that came late, and a heal that found the next epoch while this node was cut off."""
    lower = ShardInfo("s00", 2, OLD.members, "n1", 0, SLOTS // 2)
    upper = ShardInfo("s01", 2, OLD.members, "n1", SLOTS // 2, SLOTS)
    whole = ShardInfo("s00", 2, OLD.members, "n1", 0, SLOTS)
    split = Change("c1", "s00", 1, OLD.members, (lower, upper))
    heal = Change("c2", "s00", 1, OLD.members, (whole,))
    replicas = world.start("n1")
    replicas.learn(BEFORE, {"s00": split}, 5)
    full = replicas.served["s00"]
    full.machine.apply([Entry(BASE.index, BASE.term, encode(Seal(1)))])
    world.copy(replicas, lower)
    assert "s00" not in replicas.report(heal).staged
    replicas.learn(ShardMap(2, {"s00": whole}), {"s00": heal.founded(BASE)}, 9)
    assert replicas.served["s00"].info == whole
    assert replicas.served["s00"].folder == full.folder


def test_a_copy_for_a_change_that_was_given_up_founds_no_other_one(world: World) -> None:
    """A rewind was given up after its seal: healing founds the same epoch with the same members,
    from the sealed state, and not from what came out of the backup."""
    target = ShardInfo("s00", 2, OLD.members, "n1", 0, SLOTS)
    rewind = Change("c1", "s00", 1, OLD.members, (target,), source="backup")
    heal = Change("c2", "s00", 1, OLD.members, (target,))
    replicas = world.start("n1")
    replicas.learn(BEFORE, {"s00": rewind}, 5)
    sealed = replicas.served["s00"]
    sealed.machine.apply([Entry(BASE.index, BASE.term, encode(Seal(1)))])
    restored = world.copy(replicas, target)
    assert "s00" in replicas.report(rewind).staged
    assert "s00" not in replicas.report(heal).staged
    replicas.learn(ShardMap(2, {"s00": target}), {"s00": heal.founded(BASE)}, 9)
    assert replicas.served["s00"].info == target
    assert replicas.served["s00"].folder == sealed.folder
    assert replicas.drop_copies([restored]) == [restored]


def test_a_copy_does_not_wait_for_a_seal_that_its_own_replica_will_never_see(
    world: World,
) -> None:
    """A split or a copy anew follows the node's own replica, and that was cut off meanwhile."""
    target = ShardInfo("s00", 2, OLD.members, "n1", 0, SLOTS)
    anew = Change("c1", "s00", 1, OLD.members, (target,), fresh=("n3",))
    replicas = world.start("n3")
    replicas.learn(BEFORE, {"s00": anew}, 5)
    staged = world.copy(replicas, target, sealed=False)
    staged.state = Staging.FOLLOWING
    founded = ShardMap(2, {"s00": target}), {"s00": anew.founded(BASE)}, 6
    world.leader = "n1"
    replicas.learn(*founded)
    assert "s00" in replicas.served  # whoever leads the old epoch may yet tell of the seal
    world.leader = None
    replicas.learn(*founded)
    assert "s00" not in replicas.served and replicas.record.closed["s00"] == 1
    staged.state = Staging.FAILED  # its source has gone
    assert replicas.drop_copies([staged]) == [staged]
    assert replicas.wanted() == [target]
