"""One epoch's view of a state, where an entry might be taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agentmem_chaos.sim.machine import Command, MachineStore, RegisterMachine
from agentmem_cluster.epochs.commands import Begin, EpochState, Seal, Sealed, encode
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.replicas import Staged
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.shardmap import ShardInfo


def registers(epoch: EpochState) -> RegisterMachine:
    store = MachineStore()
    store.cached.epoch = epoch
    return RegisterMachine(store, lambda *_: None)


def entries(*commands: bytes, first: int = 1) -> list[Entry]:
    return [Entry(first + at, 1, command) for at, command in enumerate(commands)]


def a_write(request: str) -> bytes:
    return Command(request, "write", "k0", 1).encode()


def test_what_seals_is_not_what_begins() -> None:
    seal, begin = Seal(2), Begin(2)
    assert seal != begin


def test_an_epoch_that_begins_twice_takes_what_follows() -> None:
    inner = registers(EpochState(2, False))
    results: Sequence[Any] = EpochMachine(inner, 2).apply(
        entries(encode(Begin(2)), a_write("c0-1"), a_write("c0-2"))
    )
    assert inner.applied_index == 3
    assert inner.outcome("c0-2") == (True, 1)
    assert not any(isinstance(result, Sealed) for result in results)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_follows_the_seal_changes_nothing_however_it_comes_in_batches(cut: int) -> None:
    inner = registers(EpochState(1, False))
    machine = EpochMachine(inner, 1)
    log = entries(a_write("c0-1"), encode(Seal(1)), a_write("c0-2"), a_write("c0-3"))
    results = [*machine.apply(log[:cut]), *machine.apply(log[cut:])]
    assert machine.applied_index == 4
    assert inner.applied_index == 2
    assert results[2:] == [Sealed(1), Sealed(1)]
    assert inner.outcome("c0-2") is None


@pytest.mark.parametrize("cut", range(1, 7))
def test_an_epoch_may_begin_and_end_in_one_batch(cut: int) -> None:
    """A node that starts again, or a copy of an idle shard, gets both at once."""
    inner = registers(EpochState(1, True))
    machine = EpochMachine(inner, 2)
    log = entries(
        a_write("c0-1"),
        encode(Begin(2)),
        a_write("c0-2"),
        encode(Seal(2)),
        a_write("c0-3"),
        encode(Seal(2)),
    )
    results = [*machine.apply(log[:cut]), *machine.apply(log[cut:])]
    assert (inner.applied_index, machine.applied_index) == (4, 6)
    assert inner.outcome("c0-2") == (True, 1)
    assert inner.outcome("c0-1") is inner.outcome("c0-3") is None
    assert results[4:] == [Sealed(2), Sealed(2)]


def test_a_copy_that_has_the_seal_stays_as_it_is_when_it_goes_on_following() -> None:
    info = ShardInfo("s00", 2, ("n1",), "n1", 0, 16_384)
    staged = Staged(info, "c1", 1, "s00-e2")
    staged.machine = EpochMachine(registers(EpochState(1, False)), 1)
    staged.apply(entries(a_write("c0-1"), encode(Seal(1))))
    staged.apply([Entry(3, 9, a_write("c0-2"))])
    assert (staged.machine.inner.applied_index, staged.last_term) == (2, 1)
