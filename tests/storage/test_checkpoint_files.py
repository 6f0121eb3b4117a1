"""A checkpoint is read back as written, or refused with the file's name and what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_cluster.errors import DiskFull, InternalError
from agentmem_node.storage import environment
from agentmem_node.storage.checkpoint import (
    FILE_NAME,
    Checkpoint,
    StorageDamaged,
    read_checkpoint,
    write_checkpoint,
)
from agentmem_node.storage.environment import Environment
from agentmem_node.storage.store import Store

MAP_BYTES = 16 << 20


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(metas=st.binary(max_size=9000), state=st.binary(max_size=100))
def test_a_checkpoint_reads_back_as_it_was_written(
    metas: bytes, state: bytes, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, Checkpoint(metas, state))
    assert read_checkpoint(tmp_path) == Checkpoint(metas, state)


def test_any_flipped_bit_or_cut_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(b"m" * 100, b"state"))
    path = tmp_path / FILE_NAME
    good = path.read_bytes()
    for position in range(len(good)):
        spoiled = bytearray(good)
        spoiled[position] ^= 1 << (position % 8)
        for data in (bytes(spoiled), good[:position]):
            path.write_bytes(data)
            with pytest.raises(StorageDamaged, match="cannot be used"):
                read_checkpoint(tmp_path)


def test_a_missing_checkpoint_beside_data_is_refused_and_nothing_is_touched(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "s00"
    Store.open(folder, dim=0, map_bytes=MAP_BYTES).env.close()
    (folder / FILE_NAME).unlink()
    before = (folder / "data.mdb").read_bytes()
    with pytest.raises(StorageDamaged, match="it is missing") as refused:
        Store.open(folder, dim=0, map_bytes=MAP_BYTES)
    assert str(folder) in refused.value.hint
    assert (folder / "data.mdb").read_bytes() == before


def test_a_data_file_of_another_shard_is_refused(tmp_path: Path) -> None:
    for name, dim in (("a", 3), ("b", 4)):
        Store.open(tmp_path / name, dim=dim, map_bytes=MAP_BYTES).env.close()
    # The same layout and the same meta pages, but another state.
    (tmp_path / "b" / "data.mdb").replace(tmp_path / "a" / "data.mdb")
    with pytest.raises(StorageDamaged, match="not the snapshot that its checkpoint names"):
        Store.open(tmp_path / "a", dim=3, map_bytes=MAP_BYTES)


def test_a_model_with_another_dimension_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "s00", dim=384, map_bytes=MAP_BYTES).env.close()
    with pytest.raises(StorageDamaged, match=r"vectors of 384 values, but .* has 768"):
        Store.open(tmp_path / "s00", dim=768, map_bytes=MAP_BYTES)


def test_a_data_file_that_was_cut_is_refused_before_it_is_read(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s00", dim=2, map_bytes=MAP_BYTES)
    store.env.close()
    path = tmp_path / "s00" / "data.mdb"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(StorageDamaged, match="its end is missing"):
        Store.open(tmp_path / "s00", dim=2, map_bytes=MAP_BYTES)


def test_a_data_file_of_zeros_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "s00", dim=2, map_bytes=MAP_BYTES).env.close()
    path = tmp_path / "s00" / "data.mdb"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StorageDamaged, match=r"data\.mdb cannot be used"):
        Store.open(tmp_path / "s00", dim=2, map_bytes=MAP_BYTES)


# Somebody looks into the file with LMDB's own tools, and holds its table of readers open.
ONLOOKER = """
import lmdb, sys
env = lmdb.open(sys.argv[1], readonly=True, max_dbs=16)
with env.begin() as txn:
    print("looking", flush=True)
    sys.stdin.read()
"""


def test_an_onlooker_with_the_lock_file_open_does_not_spoil_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "s00"
    env = Environment.create(folder, ["rows"], b"0", MAP_BYTES)
    env.state = lambda: b"undone"
    for _ in range(5):
        env.txn.put(b"key", b"undone", db=env.db["rows"])
        env.commit()
    onlooker = subprocess.Popen(
        [sys.executable, "-c", ONLOOKER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert onlooker.stdout is not None
        assert onlooker.stdout.readline() == b"looking\n"
        env.close()
        again = Environment(folder, ["rows"], MAP_BYTES)
        assert again.txn.get(b"key", db=again.db["rows"]) is None
        again.state = lambda: b"1"
        for number in range(5):
            again.txn.put(b"key", b"%d" % number, db=again.db["rows"])
            again.commit()
        assert again.txn.get(b"key", db=again.db["rows"]) == b"4"
        again.close()
    finally:
        onlooker.kill()
        onlooker.communicate(timeout=20)


def test_a_failed_sync_of_the_data_is_never_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is tried again, but a second sync may succeed without what the first lost."""
    env = Environment.create(tmp_path / "s00", ["rows"], b"0", MAP_BYTES)
    env.state = lambda: b"1"
    job = env.begin_checkpoint()
    assert job is not None

    def failing(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(environment, "_datasync", failing)
    with pytest.raises(InternalError, match="could not be synced"):
        job.run()
    assert read_checkpoint(tmp_path / "s00").state == b"0"
    env.close()


def test_room_for_what_is_needed_now_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An almost full disk has no room to allocate ahead, but may have some for this change."""
    env = Environment.create(tmp_path / "s00", ["rows"], b"0", MAP_BYTES)
    asked = []

    def almost_full(fd: int, offset: int, length: int) -> None:
        asked.append(length)
        if length > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", almost_full)
    env.reserve(30_000)
    assert len(asked) == 2
    with pytest.raises(DiskFull):
        env.reserve(100_000)
    assert env.reserved == 30_000
    env.close()


def test_an_unfinished_creation_is_begun_again(tmp_path: Path) -> None:
    half = tmp_path / "s00.new"
    half.mkdir()
    (half / "data.mdb").write_bytes(b"half")
    store = Store.open(tmp_path / "s00", dim=2, map_bytes=MAP_BYTES)
    assert store.state.applied_index == 0
    assert not half.exists()
    store.env.close()


def test_two_owners_of_one_folder_are_refused(tmp_path: Path) -> None:
    """Within a process and between two: putting meta pages back under a writer would ruin it."""
    folder = tmp_path / "s00"
    store = Store.open(folder, dim=0, map_bytes=MAP_BYTES)
    with pytest.raises(InternalError, match="in use by another process"):
        Store.open(folder, dim=0, map_bytes=MAP_BYTES)
    script = (
        "import sys; from pathlib import Path; from agentmem_node.storage.store import Store; "
        "Store.open(Path(sys.argv[1]), dim=0)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=30
    )
    assert "in use by another process" in other.stderr
    store.env.close()
    Store.open(folder, dim=0, map_bytes=MAP_BYTES).env.close()


def test_one_checkpoint_at_a_time_and_none_without_a_change(tmp_path: Path) -> None:
    env = Environment.create(tmp_path / "s00", ["rows"], b"0", MAP_BYTES)
    env.state = lambda: b"0"
    assert env.begin_checkpoint() is None
    env.state = lambda: b"1"
    job = env.begin_checkpoint()
    assert job is not None
    env.state = lambda: b"2"
    assert env.begin_checkpoint() is None
    job.run()
    env.checkpoint_done(job)
    assert env.durable_state == b"1"
    with pytest.raises(ValueError, match="done already"):
        env.checkpoint_done(job)
    assert env.begin_checkpoint() is not None
    env.close()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Environment.create(tmp_path / "s00", ["rows"], b"0", MAP_BYTES)
    env.state = lambda: b"1"
    job = env.begin_checkpoint()
    assert job is not None

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(DiskFull, match="no room"):
            job.run()
    assert env.durable_state == b"0"
    assert read_checkpoint(tmp_path / "s00").state == b"0"
    # The same job may be tried again.
    job.run()
    env.checkpoint_done(job)
    assert env.durable_state == b"1"
    env.close()
