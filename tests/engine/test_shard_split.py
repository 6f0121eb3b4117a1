"""The two parts of a shard are together what it was, and each remembers its own requests."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from agentmem_cluster.epochs.commands import Seal, encode
from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Add, Delete, Update, WriteResult
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import format_ms
from tests.engine.commands import DIM, START_MS, an_entry

MIDDLE = 8_192
PARTS = ((0, MIDDLE), (MIDDLE, 16_384))


def an_id(number: int) -> bytes:
    """An id whose slot is in the lower half for even numbers and in the upper half for odd ones."""
    slot = (number * 7) % MIDDLE + (MIDDLE if number % 2 else 0)
    head = (START_MS + number).to_bytes(6, "big")
    bits = bytes([0x80 | slot >> 10, slot >> 2 & 0xFF, 0x80 | (slot & 0b11) << 4])
    return head + bits + number.to_bytes(7, "big")


def record(number: int, content: str, version: int = 1) -> bytes:
    return msgspec.json.encode(
        Memory(
            id=format_id(an_id(number)),
            content=content,
            user_id=f"user{number % 4}",
            created_at=format_ms(START_MS),
            updated_at=format_ms(START_MS),
            version=version,
        )
    )


def add(number: int) -> Add:
    vector = np.full(DIM, number, dtype="<f4").tobytes()
    return Add(an_id(number), record(number, f"memory {number}"), vector, START_MS, None)


def filled(folder: Path) -> tuple[Shard, list[Entry]]:
    shard = Shard.open(folder, "s00", dim=DIM)
    entries = [an_entry(i, *(add(10 * i + n) for n in range(10))) for i in range(1, 31)]
    updates = [Update(an_id(n), 1, record(n, f"changed {n}", 2), None, None) for n in range(20, 60)]
    entries.append(an_entry(31, *updates))
    entries.append(an_entry(32, *(Delete(an_id(n), None) for n in range(50, 90))))
    entries.append(Entry(33, 1, encode(Seal(1))))
    shard.apply(entries)
    return shard, entries


def parts_of(tmp_path: Path) -> tuple[Shard, list[Shard], list[Entry]]:
    whole, entries = filled(tmp_path / "whole")
    job = whole.checkpoint()
    assert job is not None
    job.run()
    whole.checkpoint_done(job)
    parts = []
    for number, (start, end) in enumerate(PARTS):
        shutil.copytree(tmp_path / "whole", tmp_path / f"part{number}")
        part = Shard.open(tmp_path / f"part{number}", "s00", dim=DIM)
        assert list(part.restrict(start, end))
        parts.append(part)
    return whole, parts, entries


def test_every_memory_is_in_exactly_one_part_with_its_history(tmp_path: Path) -> None:
    whole, parts, _ = parts_of(tmp_path)
    for number in range(10, 310):
        key = an_id(number)
        home, other = parts[number % 2], parts[1 - number % 2]
        assert home.get("acme", key) == whole.get("acme", key)
        assert home.history("acme", key) == whole.history("acme", key)
        assert other.get("acme", key) is None and other.history("acme", key) == []
    assert [part.count() for part in parts] == [130, 130]
    assert sum(part.count("acme") for part in parts) == whole.count("acme") == 260
    for owner in (f"user:user{n}" for n in range(4)):
        assert sum(part.count("acme", owner) for part in parts) == whole.count("acme", owner)
    listed = [
        [item.id for item in part.list("acme", None, accept=None, after=None, limit=500, now_ms=0)]
        for part in parts
    ]
    everything = whole.list("acme", None, accept=None, after=None, limit=500, now_ms=0)
    assert sorted([*listed[0], *listed[1]]) == sorted(item.id for item in everything)
    assert parts[0].digest() != parts[1].digest()


def test_replicas_of_a_part_are_equal_and_go_on_alike(tmp_path: Path) -> None:
    _, (part, _), _ = parts_of(tmp_path)
    twin, _ = filled(tmp_path / "twin")
    assert list(twin.restrict(*PARTS[0]))
    assert twin.digest() == part.digest()
    assert twin.stats()["vectors"] == part.stats()["vectors"] == 130
    assert twin.stats()["history_versions"] == part.stats()["history_versions"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_retry_after_the_split_is_answered_by_each_part_for_its_own(
    tmp_path: Path, number: int
) -> None:
    _, parts, entries = parts_of(tmp_path)
    part = parts[number]
    part.rebase(40, 1)
    part._store.state.epoch, part._store.state.is_sealed = 2, False
    own = [add(n) for n in range(10, 20) if n % 2 == number]
    (result,) = part.apply([an_entry(41, *own, request=-1)])
    assert isinstance(result, WriteResult) and result.replayed
    assert [outcome.id for outcome in result.outcomes] == [op.id for op in own]
    assert part.count() == 130
    assert len(entries) == 33
