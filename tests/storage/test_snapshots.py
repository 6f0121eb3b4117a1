"""A snapshot is one moment of a shard, whatever is written while it is read, and however often
its copying was interrupted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmem_cluster.errors import InternalError
from agentmem_node.storage.environment import Environment
from agentmem_node.storage.snapshot import (
    CHUNK_BYTES,
    SnapshotWriter,
    StorageSnapshot,
    chunk_hash,
    discard,
    partial_folder,
)

MAP_BYTES = 256 << 20


def make(folder: Path) -> Environment:
    return Environment.create(folder, ["rows"], b"state 0", MAP_BYTES)


def fill(env: Environment, chance: random.Random, rows: int) -> None:
    env.reserve(rows * 8_192)
    for _ in range(rows):
        key = b"%06d" % chance.randrange(2_000)
        if chance.random() < 0.3:
            env.txn.delete(key, db=env.db["rows"])
        else:
            env.txn.put(key, chance.randbytes(chance.randrange(4_000)), db=env.db["rows"])


def rows_of(env: Environment) -> dict[bytes, bytes]:
    return dict(env.txn.cursor(db=env.db["rows"]))


def copy(snapshot: StorageSnapshot, folder: Path) -> int:
    """Returns how many chunks had to be sent."""
    writer = SnapshotWriter(folder, snapshot.size_bytes)
    sent = 0
    for number in range(snapshot.chunks):
        data = snapshot.read(number)
        if writer.hash_of(number) != chunk_hash(data):
            writer.write(number, data)
            sent += 1
    writer.finish(snapshot.checkpoint)
    return sent


@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_while_a_snapshot_is_read_is_not_in_it(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    env = make(tmp_path / "source")
    fill(env, chance, 1_500)
    env.state = lambda: b"state 1"
    expected = rows_of(env)
    snapshot = env.open_snapshot()
    env.state = lambda: b"state 2"
    writer = SnapshotWriter(tmp_path / "copy", snapshot.size_bytes)
    for number in range(snapshot.chunks):
        fill(env, chance, 400)
        env.commit()
        job = env.begin_checkpoint()
        if job is not None:
            job.run()
            env.checkpoint_done(job)
        writer.write(number, snapshot.read(number))
    writer.finish(snapshot.checkpoint)
    snapshot.close()
    assert rows_of(env) != expected
    copied = Environment(tmp_path / "copy", ["rows"], MAP_BYTES)
    assert rows_of(copied) == expected
    assert copied.durable_state == b"state 1"
    fill(copied, chance, 200)  # a copy is as good as the original: it can be written
    copied.commit()
    copied.close()
    env.close()


def test_an_interrupted_copy_goes_on_where_it_was_even_from_a_later_snapshot(
    tmp_path: Path,
) -> None:
    chance = random.Random(7)
    env = make(tmp_path / "source")
    env.reserve(64 << 20)
    for key in range(3_000):
        env.txn.put(b"a%06d" % key, chance.randbytes(3_000), db=env.db["rows"])
    first = env.open_snapshot()
    writer = SnapshotWriter(tmp_path / "copy", first.size_bytes)
    for number in range(first.chunks - 1):
        writer.write(number, first.read(number))
    writer.close()
    first.close()
    assert not (tmp_path / "copy").exists()
    env.reserve(1 << 20)
    env.txn.put(b"z", b"later", db=env.db["rows"])
    second = env.open_snapshot()
    assert second.chunks > 8
    sent = copy(second, tmp_path / "copy")
    assert sent <= 4, f"{sent} of {second.chunks} chunks were sent again"
    copied = Environment(tmp_path / "copy", ["rows"], MAP_BYTES)
    assert rows_of(copied) == rows_of(env)
    copied.close()
    env.close()


def test_chunks_have_one_size_and_bounds(tmp_path: Path) -> None:
    env = make(tmp_path / "source")
    snapshot = env.open_snapshot()
    assert snapshot.size_bytes < CHUNK_BYTES and snapshot.chunks == 1
    with pytest.raises(ValueError, match="chunk 1 is not within"):
        snapshot.read(1)
    writer = SnapshotWriter(tmp_path / "copy", snapshot.size_bytes)
    with pytest.raises(ValueError, match="chunk 0 has 3 bytes"):
        writer.write(0, b"abc")
    writer.close()
    env.close()
    assert not snapshot.is_open, "an environment that closes lets go of its snapshots"


def test_a_snapshot_never_replaces_a_shard(tmp_path: Path) -> None:
    env = make(tmp_path / "source")
    other = make(tmp_path / "copy")
    snapshot = env.open_snapshot()
    with pytest.raises(InternalError, match="is there already"):
        copy(snapshot, tmp_path / "copy")
    env.close()
    other.close()


def test_a_discarded_shard_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "s00").close()
    partial_folder(tmp_path / "s00").mkdir()
    discard(tmp_path / "s00")
    discard(tmp_path / "s00")
    assert list(tmp_path.iterdir()) == []


def test_whoever_reads_a_closed_snapshot_is_told_and_touches_nothing(tmp_path: Path) -> None:
    env = make(tmp_path / "source")
    snapshot = env.open_snapshot()
    with snapshot.using() as reader:
        assert reader is not None
    env.close()
    assert not snapshot.is_open
    with pytest.raises(OSError, match="has left this node"):
        snapshot.read(0)
    with pytest.raises(OSError, match="has left this node"), snapshot.using():
        raise AssertionError("there is nothing to be used")
