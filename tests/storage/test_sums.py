"""What LMDB would serve as it is: bits that flipped in its file while nobody looked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from random import Random

import pytest

from agentmem_node.backup.content import rows
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Delete, Update
from agentmem_node.storage.checkpoint import DATA_NAME, RecordDamaged
from agentmem_node.storage.environment import Environment
from tests.engine.commands import DIM, a_record, an_add, an_entry, an_id, check_sums

MARKED = "a very particular sort of oolong"


def filled(folder: Path) -> None:
    """Twenty memories; number 3 was changed, number 4 was deleted."""
    shard = Shard.open(folder, "s00", dim=DIM)
    shard.apply([an_entry(1, *(an_add(n, f"{MARKED} {n:04}") for n in range(20)))])
    changed = a_record(an_id(3), f"{MARKED} again", 2)
    shard.apply([an_entry(2, Update(an_id(3), 1, changed, None, None), Delete(an_id(4), None))])
    shard.close()


def replace(folder: Path, found: bytes, by: bytes) -> None:
    """Everywhere in the file, as it lies there: nothing is moved."""
    path = folder / DATA_NAME
    data = path.read_bytes()
    assert found in data and len(found) == len(by)
    path.write_bytes(data.replace(found, by))


def test_a_changed_text_is_refused_and_all_others_are_served(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    replace(tmp_path / "s", f"{MARKED} 0007".encode(), f"{MARKED} 0008".encode())
    shard = Shard.open(tmp_path / "s", "s00", dim=DIM)
    told: list[RecordDamaged] = []
    shard.watch(told.append)
    with pytest.raises(RecordDamaged, match="memory number 8"):
        shard.get("acme", an_id(7))
    assert len(told) == 1
    assert shard.get("acme", an_id(8)) is not None
    with pytest.raises(RecordDamaged):
        shard.list("acme", "user:ana", accept=None, after=None, limit=20, now_ms=0)
    with pytest.raises(RecordDamaged):
        check_sums(shard)
    with pytest.raises(RecordDamaged):  # nor is it to become a backup
        list(rows(shard._store.env.txn, shard.databases))
    # Deciding on it is refused as well: replicas would differ.
    with pytest.raises(RecordDamaged):
        shard.apply([an_entry(3, Delete(an_id(7), None))])
    assert shard.checkpoint() is None, "an entry may be half applied"
    with pytest.raises(RecordDamaged):
        shard.apply([an_entry(3, Delete(an_id(8), None))])
    shard.abandon()


def test_a_changed_past_version_and_a_changed_vector_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    replace(tmp_path / "s", f"{MARKED} 0003".encode(), f"{MARKED} 0002".encode())
    shard = Shard.open(tmp_path / "s", "s00", dim=DIM)
    assert shard.get("acme", an_id(3)) is not None
    with pytest.raises(RecordDamaged, match="version 1 of memory number 4"):
        shard.history("acme", an_id(3))
    shard.abandon()

    filled(tmp_path / "t")
    vector = an_add(9).vector
    assert vector is not None
    replace(tmp_path / "t", vector, an_add(10).vector or b"")
    shard = Shard.open(tmp_path / "t", "s00", dim=DIM)
    with pytest.raises(RecordDamaged, match="vector of memory number 10"):
        list(shard.source.scan("acme", None))
    with pytest.raises(RecordDamaged):
        check_sums(shard)
    shard.abandon()


def test_bits_that_flip_in_texts_are_found_wherever_they_are(tmp_path: Path) -> None:
    """In texts alone: of what leads to them LMDB itself believes everything, and may crash. A flip
    may also hit a page that is free."""
    folder = tmp_path / "s"
    shard = Shard.open(folder, "s00", dim=DIM)
    for at in range(1, 31):
        adds = [an_add(10 * at + n, f"{MARKED} {at} {n} " * 40) for n in range(10)]
        shard.apply([an_entry(at, *adds)])
    shard.close()
    data = (folder / DATA_NAME).read_bytes()
    texts = [found.span() for found in re.finditer(MARKED.encode(), data)]
    pristine = {n: _served(folder, an_id(n)) for n in range(10, 310)}
    found = 0
    for seed in range(40):
        rotten = tmp_path / f"rot{seed}"
        shutil.copytree(folder, rotten)
        chance, flipped = Random(seed), bytearray(data)
        for start, end in chance.sample(texts, 8):
            flipped[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        (rotten / DATA_NAME).write_bytes(flipped)
        shard = Shard.open(rotten, "s00", dim=DIM)
        is_found = False
        try:
            check_sums(shard)
        except RecordDamaged:
            is_found = True
        finally:
            shard.abandon()
        found += is_found
        for number, was in pristine.items():
            now = _served(rotten, an_id(number))
            assert now in (was, "refused"), f"seed {seed} changed memory {number} in silence"
        shutil.rmtree(rotten)
    assert found >= 36


def _served(folder: Path, key: bytes) -> object:
    shard = Shard.open(folder, "s00", dim=DIM)
    try:
        return shard.get("acme", key)
    except RecordDamaged:
        return "refused"
    finally:
        shard.abandon()


def test_rows_that_an_earlier_version_wrote_or_changed_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows neither of the sums nor that its writes make them wrong."""
    filled(tmp_path / "s")
    shard = Shard.open(tmp_path / "s", "s00", dim=DIM)
    with monkeypatch.context() as earlier:
        commit = Environment._commit

        def as_before(env: Environment, state: bytes, reserved: int) -> None:
            summed = env.txn.get(b"summed", db=env._state_db)
            put = env.txn.put

            class Txn:
                def __getattr__(self, name: str) -> object:
                    return getattr(real, name)

                def put(self, key: bytes, value: bytes, db: object) -> None:
                    put(key, summed if key == b"summed" else value, db=db)

            real, env.txn = env.txn, Txn()
            commit(env, state, reserved)

        earlier.setattr(Environment, "_commit", as_before)
        shard.apply([an_entry(3, Update(an_id(5), 1, a_record(an_id(5), "tea", 2), None, None))])
        key = (6).to_bytes(8, "big")
        store = shard._store
        store.env.txn.put(
            key, store.env.txn.get(key, db=store.env.db["sums"])[::-1], db=store.env.db["sums"]
        )
        shard.close()
    shard = Shard.open(tmp_path / "s", "s00", dim=DIM)
    stored = shard.get("acme", an_id(5))
    assert stored is not None and b"tea" in stored.record
    assert shard._store.entries("sums") == 0
    shard.apply([an_entry(4, Update(an_id(5), 2, a_record(an_id(5), "rain", 3), None, None))])
    assert shard._store.entries("sums") == 2
    shard.close()
    replace(tmp_path / "s", b"rain", b"pain")
    shard = Shard.open(tmp_path / "s", "s00", dim=DIM)
    with pytest.raises(RecordDamaged):
        shard.get("acme", an_id(5))
    shard.abandon()
