"""What a disk remembers, and what is done when it cannot: on a simulated disk."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.machine import MachineStore, RegisterMachine
from agentmem_cluster.epochs.change import Base, Change
from agentmem_cluster.epochs.commands import EpochState
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.meta import NodeInfo
from agentmem_cluster.raft.api import GROUP_META, GroupSpec
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.admission import admit
from agentmem_node.service.view import View

S00 = ShardInfo("s00", 2, ("n1", "n2", "n3"), "n1", 0, 16_384)
BASE = Base(5, 1)


def a_view(epoch: int = 2, **incarnations: str) -> View:
    nodes = {name: NodeInfo("", "", "", incarnation) for name, incarnation in incarnations.items()}
    info = ShardInfo("s00", epoch, S00.members, "n1", 0, 16_384)
    return View("c", ModelIdentity("none", 0, ""), nodes, ShardMap(epoch, {"s00": info}))


def a_disk() -> SimDisk:
    return SimDisk(random.Random(1))


def test_a_disk_that_the_cluster_does_not_know_takes_part_in_nothing() -> None:
    record = LocalRecord("new")
    assert not admit(record, a_view(n2="other"), "n1", a_disk())
    assert not record.may_take_part("s00", 2)
    assert not admit(record, a_view(n1="new"), "n1", a_disk())
    assert record.may_take_part("s00", 2)


def test_a_founder_takes_part_in_no_shard_before_the_cluster_knows_its_disk() -> None:
    """It voted in the group that will know it, and in nothing else: lost then, it is missed."""
    record, disk = LocalRecord("mine"), a_disk()
    record.found(GROUP_META, Held(1, "meta"))
    record.found(GROUP_META, Held(1, "meta"))  # its folder could not be made the first time
    with pytest.raises(ValueError, match="holds meta"):
        record.found(GROUP_META, Held(1, "another"))
    assert not admit(record, a_view(1), "n1", disk)  # it registers first
    assert not record.may_take_part("s00", 1)
    assert not admit(record, a_view(1, n1="mine"), "n1", disk)
    assert record.may_take_part("s00", 1)
    assert record.held[GROUP_META].epoch == 1
    with pytest.raises(ValueError, match="closed epochs"):
        LocalRecord("other", closed={GROUP_META: 1}).found(GROUP_META, Held(1, "meta"))


def test_a_new_disk_is_kept_out_of_every_epoch_until_the_cluster_knows_it() -> None:
    record, disk = LocalRecord("new"), a_disk()
    assert admit(record, a_view(2, n1="lost"), "n1", disk)
    assert not record.is_admitted
    # A late view told of the old disk; meanwhile that disk may have voted in another epoch.
    assert admit(record, a_view(3, n1="new"), "n1", disk)
    assert record.is_admitted
    assert not record.may_take_part("s00", 3)
    assert record.may_take_part("s00", 4)
    assert not record.may_take_part(GROUP_META, 1)
    assert not admit(record, a_view(4, n1="new"), "n1", disk)
    assert record.may_take_part("s00", 4)


class Groups:
    """No Raft: what is served is all that is asked here."""

    def __init__(self) -> None:
        self.added: list[GroupSpec] = []

    def add_group(self, spec: GroupSpec, machine: object) -> None:
        self.added.append(spec)


def a_member_with_a_copy(disk: SimDisk) -> tuple[ReplicaSet, Groups, Mapping[str, Change]]:
    groups = Groups()
    change = Change("c1", "s00", 1, ("n2", "n3", "n4"), (S00,))
    replicas = ReplicaSet("n1", disk, LocalRecord("d", is_admitted=True), groups, None)  # type: ignore[arg-type]
    staged = replicas.begin_copy(S00, "c1", 1)
    store = MachineStore()
    store.durable.applied_index, store.durable.epoch = BASE.index, EpochState(1, True)
    store.cached = store.durable.copy()
    staged.machine = EpochMachine(RegisterMachine(store, lambda *_: None), 1)
    staged.state = Staging.COMPLETE
    return replicas, groups, {"s00": change.founded(BASE)}


def test_nobody_takes_part_by_a_record_that_could_not_be_written() -> None:
    disk = a_disk()
    replicas, groups, changes = a_member_with_a_copy(disk)
    shard_map = ShardMap(2, {"s00": S00})
    disk.full = True
    for _ in range(3):
        with pytest.raises(OSError):
            replicas.learn(shard_map, changes)
        assert groups.added == []
    disk.full = False
    replicas.learn(shard_map, changes)
    assert [spec.epoch for spec in groups.added] == [2]
    kept = LocalRecord.load(disk.platter())
    assert kept is not None and kept.held["s00"].epoch == 2


def test_nobody_promises_by_a_record_that_could_not_be_written() -> None:
    disk = a_disk()
    replicas, _, _ = a_member_with_a_copy(disk)
    disk.full = True
    for _ in range(3):
        with pytest.raises(OSError):
            replicas.close("s00", 1)
    disk.full = False
    assert replicas.close("s00", 1)
    kept = LocalRecord.load(disk.platter())
    assert kept is not None and kept.closed["s00"] == 1
