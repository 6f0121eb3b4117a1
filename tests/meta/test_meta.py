"""The meta group's state: the first founder wins, bad commands are results, checkpoints survive."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_chaos.sim.disk import SimDisk
from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.meta import (
    LEVEL_OF_CHANGES,
    ClusterSettings,
    MetaCorrupt,
    MetaStateMachine,
    NodeInfo,
    begin_change,
    change_voters,
    end_change,
    found_epoch,
    init_cluster,
    kv_delete,
    kv_put,
    put_node,
    remove_node,
    set_map,
)
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.shardmap import ShardMap
from agentmem_cluster.splitting import split_ranges

SETTINGS = ClusterSettings("c0ffee", "north", "all-MiniLM-L6-v2", 384, "abc", 1_700_000_000_000)
MAP = ShardMap.initial(["n1", "n2", "n3"])
INFO = NodeInfo("127.0.0.1:7801", "http://127.0.0.1:7701", "0.1.0")


def machine(disk: SimDisk | None = None) -> MetaStateMachine:
    return MetaStateMachine(disk or SimDisk(random.Random(1)))


def run(meta: MetaStateMachine, *commands: bytes) -> list[str]:
    first = meta.applied_index + 1
    entries = [Entry(first + i, 1, command) for i, command in enumerate(commands)]
    return [outcome.status for outcome in meta.apply(entries)]


def checkpoint(meta: MetaStateMachine) -> None:
    job = meta.checkpoint()
    if job is not None:
        job.run()
        meta.checkpoint_done(job)


def next_map(shard_map: ShardMap) -> ShardMap:
    return ShardMap(shard_map.version + 1, shard_map.shards)


def test_the_first_to_found_the_cluster_wins() -> None:
    meta = machine()
    other = ClusterSettings("beef", "south", "other", 3, "", 1)
    assert run(meta, init_cluster(SETTINGS, MAP), init_cluster(other, MAP)) == ["ok", "exists"]
    assert meta.state.settings == SETTINGS
    assert meta.state.map == MAP


def test_nodes_and_values_come_and_go() -> None:
    meta = machine()
    assert run(meta, put_node("n1", INFO), kv_put("key", b"\x00v"), remove_node("n2")) == [
        "ok",
        "ok",
        "not_found",
    ]
    assert meta.state.nodes == {"n1": INFO}
    assert meta.state.kv == {"key": b"\x00v"}
    assert run(meta, remove_node("n1"), kv_delete("key"), kv_delete("key")) == [
        "ok",
        "ok",
        "not_found",
    ]
    assert not meta.state.nodes and not meta.state.kv


def test_a_map_replaces_only_the_version_that_was_read() -> None:
    meta = machine()
    second = next_map(MAP)
    assert run(meta, set_map(1, second)) == ["conflict"]
    run(meta, init_cluster(SETTINGS, MAP))
    assert run(meta, set_map(1, second), set_map(1, second), set_map(2, second)) == [
        "ok",
        "conflict",
        "conflict",
    ]
    assert meta.state.map == second


def test_who_gives_a_change_up_late_does_not_end_one_that_was_founded() -> None:
    meta = machine()
    info = MAP.shards["s00"]
    change = Change("c1", "s00", info.epoch, info.members, (replace(info, epoch=info.epoch + 1),))
    assert run(
        meta,
        init_cluster(SETTINGS, MAP),
        begin_change(change),
        found_epoch("c1", "s00", Base(7, 1)),
        end_change("c1", "s00", Phase.COPY),
    ) == ["ok", "ok", "ok", "conflict"]
    assert meta.state.changes, "members that do not serve yet need its base"
    assert run(meta, end_change("c1", "s00", Phase.FOUNDED)) == ["ok"]


def test_values_are_bounded() -> None:
    meta = machine()
    big = b"x" * (1 << 20)
    assert run(meta, kv_put("k", big + b"x")) == ["too_large"]
    results = run(meta, *[kv_put(f"k{i}", big) for i in range(70)])
    assert results.count("too_large") >= 6
    assert run(meta, kv_put("k0", b"small"), kv_put("free", big)) == ["ok", "ok"]


def test_two_splits_never_make_one_and_the_same_shard() -> None:
    """The second one sealed its shard, and could then not be founded: no write any more."""
    meta = machine()
    shards = MAP.shards

    def splitting(shard: str) -> Change:
        info = shards[shard]
        cut = split_ranges(MAP, shard)
        targets = tuple(
            replace(info, id=name, epoch=2, slot_start=slots[0], slot_end=slots[1])
            for name, slots in ((shard, cut.kept_slots), (cut.new_shard, cut.new_slots))
        )
        return Change(f"split-{shard}", shard, 1, info.members, targets)

    first, second = splitting("s00"), splitting("s01")
    assert first.targets[1].id == second.targets[1].id
    done = run(meta, init_cluster(SETTINGS, MAP), begin_change(first), begin_change(second))
    assert done == ["ok", "ok", "conflict"]
    given_up = end_change("split-s00", "s00", Phase.COPY)
    assert run(meta, given_up, begin_change(second)) == ["ok", "ok"]


def test_raft_own_entries_change_nothing() -> None:
    meta = machine()
    calls: list[int] = []
    meta.on_change.append(lambda: calls.append(1))
    assert run(meta, b"", b"") == ["ok", "ok"]
    assert (meta.applied_index, calls) == (2, [])
    run(meta, kv_put("a", b"1"), kv_put("b", b"2"))
    assert calls == [1]


GOOD = st.sampled_from(
    [
        b"",
        init_cluster(SETTINGS, MAP),
        put_node("n1", INFO),
        put_node("n2", INFO),
        remove_node("n1"),
        set_map(1, next_map(MAP)),
        kv_put("a", b"1"),
        kv_delete("a"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
BAD = st.binary(max_size=40) | st.builds(
    lambda kind, rest: bytes(msgpack.packb([1, kind, *rest])), st.integers(0, 15), st.lists(VALUES)
)


@pytest.mark.parametrize("kind", range(16))
@pytest.mark.parametrize("values", [["x"], ["x", "s00"], ["x", "s00", 1, 2, 3, 4]], ids=len)
def test_a_command_with_too_few_or_too_many_values_is_a_result(
    kind: int, values: list[object]
) -> None:
    meta = machine()
    run(meta, init_cluster(SETTINGS, MAP))
    before = meta.state.to_wire()
    (status,) = run(meta, bytes(msgpack.packb([1, kind, *values])))
    assert status in ("bad_command", "not_found")
    assert meta.state.to_wire() == before


@given(st.lists(BAD, max_size=8))
def test_a_bad_command_is_a_result_and_changes_nothing(commands: list[bytes]) -> None:
    meta = machine()
    run(meta, init_cluster(SETTINGS, MAP), put_node("n1", INFO))
    for command in commands:
        before = meta.state.to_wire()
        (status,) = run(meta, command)
        if status not in ("ok", "exists"):
            assert meta.state.to_wire() == before


@given(st.lists(GOOD | BAD, max_size=12), st.data())
def test_replicas_agree_however_entries_are_batched(
    commands: list[bytes], data: st.DataObject
) -> None:
    one, two = machine(), machine()
    results = run(one, *commands) if commands else []
    again: list[str] = []
    rest = list(commands)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        again += run(two, *rest[:size])
        del rest[:size]
    assert results == again
    assert one.digest() == two.digest()
    assert one.state == two.state


def test_different_histories_have_different_digests() -> None:
    one, two = machine(), machine()
    run(one, kv_put("a", b"1"), kv_put("a", b"2"))
    run(two, kv_put("a", b"2"), kv_put("a", b"1"))
    assert one.digest() != two.digest()


@given(st.lists(GOOD, max_size=12), st.integers(0, 12))
def test_a_restart_goes_on_from_the_checkpoint(commands: list[bytes], at: int) -> None:
    disk = SimDisk(random.Random(1))
    meta = machine(disk)
    if commands[:at]:
        run(meta, *commands[:at])
    checkpoint(meta)
    state, digest, index = meta.state, meta.digest(), meta.applied_index
    assert meta.durable_index == index
    assert meta.checkpoint() is None
    disk.power_loss()
    again = machine(disk)
    assert (again.applied_index, again.durable_index) == (index, index)
    assert again.digest() == digest
    assert again.state == state
    if commands[at:]:
        assert run(again, *commands[at:]) == run(meta, *commands[at:])
    assert again.digest() == meta.digest()


def test_a_power_loss_during_a_checkpoint_leaves_the_old_one_or_the_new() -> None:
    seen = set()
    for seed in range(60):
        disk = SimDisk(random.Random(seed))
        meta = machine(disk)
        run(meta, kv_put("a", b"old" * 500))
        checkpoint(meta)
        run(meta, kv_put("a", b"new" * 700))
        job = meta.checkpoint()
        assert job is not None
        disk.before_sync = lambda path, seed=seed: _maybe_fail(path, seed)  # type: ignore[method-assign]
        try:
            job.run()
        except OSError:
            pass
        disk.power_loss()
        del disk.before_sync
        value = machine(disk).state.kv["a"]
        assert value in (b"old" * 500, b"new" * 700)
        seen.add(value[:3])
    assert b"old" in seen


def _maybe_fail(path: str, seed: int) -> None:
    if seed % 3 == (0 if path.endswith("new") else 1):
        raise OSError(5, "power is failing", path)


def test_a_damaged_checkpoint_is_refused_by_name() -> None:
    disk = SimDisk(random.Random(1))
    meta = machine(disk)
    run(meta, init_cluster(SETTINGS, MAP), kv_put("a", b"1"))
    checkpoint(meta)
    file = disk.open("meta/state")
    whole = file.pread(file.size(), 0)
    for at in range(0, len(whole), 7):
        file.pwrite(bytes([whole[at] ^ 4]), at)
        with pytest.raises(MetaCorrupt, match="meta/state"):
            machine(disk)
        file.pwrite(whole[at : at + 1], at)
    file.truncate(len(whole) - 1)
    with pytest.raises(MetaCorrupt):
        machine(disk)


@pytest.mark.parametrize(
    "wire",
    [
        None,
        {},
        {"peer": 1, "http": "", "version": ""},
        {"peer": "x" * 2000, "http": "", "version": ""},
    ],
)
def test_a_node_that_cannot_be_is_a_value_error(wire: Any) -> None:
    with pytest.raises(ValueError, match="NodeInfo"):
        NodeInfo.from_wire(wire)


def test_fields_of_a_later_version_are_ignored() -> None:
    assert NodeInfo.from_wire({**INFO.to_wire(), "rack": "eu"}) == INFO
    assert ClusterSettings.from_wire({**SETTINGS.to_wire(), "x": 1}) == SETTINGS


def test_a_checkpoint_that_an_older_version_wrote_is_known_as_such() -> None:
    """It lacks what that version did not understand of the commands that it carried out."""
    disk = SimDisk(random.Random(1))
    meta = machine(disk)
    run(meta, init_cluster(SETTINGS, MAP), put_node("n1", INFO))
    checkpoint(meta)
    assert not machine(disk).is_from_older
    older = msgpack.unpackb(meta.image())
    del older["state"]["level"]
    again = MetaStateMachine.install(disk, "older", msgpack.packb(older))
    assert again.is_from_older
    assert again.state == meta.state
    run(again, kv_put("a", b"1"))
    checkpoint(again)
    assert not MetaStateMachine(disk, "older").is_from_older


def test_the_first_change_needs_a_level_that_older_versions_lack() -> None:
    meta = machine()
    run(meta, init_cluster(SETTINGS, MAP), put_node("n1", INFO), kv_put("node/n1", b"draining"))
    assert meta.state.needs_level == 1
    assert run(meta, change_voters(1, ["n1", "n2", "n4"])) == ["ok"]
    assert meta.state.needs_level == LEVEL_OF_CHANGES
    meta = machine()
    run(meta, init_cluster(SETTINGS, MAP))
    s00 = MAP.shards["s00"]
    target = replace(s00, epoch=2, members=("n1", "n2", "n4"), preferred_leader="n1")
    change = Change("c1", "s00", 1, s00.members, (target,), operation="move-1")
    assert run(meta, begin_change(change)) == ["ok"]
    assert meta.state.needs_level == LEVEL_OF_CHANGES
