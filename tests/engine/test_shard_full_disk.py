"""No room: a batch is refused as a whole, reads go on, and the same batch succeeds later."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem_cluster.errors import DiskFull
from agentmem_node.engine.shard import Shard
from tests.engine.commands import DIM, an_id, batches

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def untouched(tmp_path: Path) -> Shard:
    shard = Shard.open(tmp_path / "untouched", "s00", dim=DIM)
    shard.apply(batches(1, 60))
    return shard


def test_a_full_disk_refuses_the_batch_and_lets_it_in_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Shard
) -> None:
    shard = Shard.open(tmp_path / "s00", "s00", dim=DIM)
    entries = batches(1, 60)
    shard.apply(entries[:5])
    before = shard.digest()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match="no room on the disk"):
            shard.apply(entries[5:])
        assert shard.applied_index == 5
        assert shard.digest() == before
        assert shard.get("acme", an_id(10)) is not None
        assert shard.get("acme", an_id(60)) is None
        # A checkpoint needs no more room than what was reserved before.
        job = shard.checkpoint()
        assert job is not None
        job.run()
        shard.checkpoint_done(job)
        assert shard.durable_index == 5
    shard.apply(entries[5:])
    assert shard.digest() == untouched.digest()
    shard.close()
    untouched.close()


def test_a_full_map_refuses_the_batch_until_it_is_opened_with_a_larger_one(
    tmp_path: Path, untouched: Shard
) -> None:
    entries = batches(1, 60)
    shard = Shard.open(tmp_path / "s00", "s00", dim=DIM, map_size=1 << 20)
    with pytest.raises(DiskFull, match=r"may use.*") as refused:
        for entry in entries:
            shard.apply([entry])
    assert "storage.map_bytes" in refused.value.hint
    at = shard.applied_index
    assert 0 < at < 60
    assert shard.get("acme", an_id(10)) is not None
    shard.close()
    shard = Shard.open(tmp_path / "s00", "s00", dim=DIM, map_size=64 << 20)
    assert shard.applied_index == at
    shard.apply(entries[at:])
    assert shard.digest() == untouched.digest()
    shard.close()
    untouched.close()


# A file system that cannot promise room, and a limit that really fails LMDB's writes.
FAILING = """
import errno, os, resource, sys
from pathlib import Path
from agentmem_cluster.errors import InternalError
from agentmem_node.engine import shard as shard_module
from agentmem_node.engine.shard import Shard
from tests.engine.commands import DIM, batches

def cannot(fd, offset, length):
    raise OSError(errno.EOPNOTSUPP, "not supported")

os.posix_fallocate = cannot
shard_module._COMMIT_BYTES = 300_000
shard = Shard.open(Path(sys.argv[1]), "s00", dim=DIM)
entries = batches(1, 60)
shard.apply(entries[:5])
job = shard.checkpoint()
job.run()
shard.checkpoint_done(job)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    for entry in entries[5:]:
        shard.apply([entry])
except InternalError as error:
    print("stopped", error)
try:
    shard.apply(entries[shard.applied_index:][:1])
except InternalError as error:
    print("refused", error)
shard.close()
"""


def test_a_commit_that_fails_stops_the_shard_and_loses_nothing_of_the_checkpoint(
    tmp_path: Path, untouched: Shard
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path / "s00")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["stopped", "refused"]
    shard = Shard.open(tmp_path / "s00", "s00", dim=DIM)
    assert shard.applied_index == 5
    shard.apply(batches(6, 60))
    assert shard.digest() == untouched.digest()
    shard.close()
    untouched.close()
