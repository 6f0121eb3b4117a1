"""The journal on a real disk, with a real process that is killed while it writes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.realtime import RealClock, RealDisk, RealRng

WRITER = """
import sys
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.realtime import RealDisk

journal = Journal.open(RealDisk(sys.argv[1]), segment_bytes=1 << 16)
log = journal.group("s00", 1)
print(log.last_index, flush=True)
while True:
    first = log.last_index + 1
    log.append([Entry(first + i, 1, b"%d " % (first + i) * 50) for i in range(7)])
    job = journal.begin_flush()
    job.run()
    journal.flushed(job)
    print(log.durable_index, flush=True)
    if log.durable_index - log.first_index > 2000:
        log.compact_to(log.durable_index - 1000)
        journal.reclaim()
"""


@pytest.mark.process
def test_kill_9_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    durable = 0
    for turn in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        timer = threading.Timer(20, writer.kill)
        timer.start()
        try:
            assert writer.stdout is not None
            assert int(writer.stdout.readline()) >= durable
            for _ in range(400 + 31 * turn):
                durable = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            for line in writer.stdout:
                if line.endswith("\n"):
                    durable = int(line)
        finally:
            timer.cancel()
            writer.kill()
            writer.wait(10)
    log = Journal.open(RealDisk(tmp_path), segment_bytes=1 << 16).group("s00", 1)
    assert log.last_index >= durable > 7000
    for entry in log.slice(log.first_index, log.last_index, 1 << 30):
        assert entry.command == b"%d " % entry.index * 50


def test_a_flush_may_run_in_another_thread(tmp_path: Path) -> None:
    journal = Journal.open(RealDisk(tmp_path), clock=RealClock())
    log = journal.group("s00", 1)
    for first in range(1, 50, 7):
        log.append([Entry(first + i, 1, b"x" * 100) for i in range(7)])
        job = journal.begin_flush()
        assert job is not None
        thread = threading.Thread(target=job.run)
        thread.start()
        assert log.command_at(first).command == b"x" * 100
        thread.join(10)
        journal.flushed(job)
        assert log.durable_index == first + 6
    stats = journal.stats()
    assert stats.syncs == 7
    assert stats.sync_seconds >= stats.sync_seconds_max > 0
    journal.close()


def test_files_are_private_and_stay_below_the_root(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "data")
    disk.make_dir("a/b")
    disk.open("a/b/file", create=True).close()
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data/a/b/file").stat().st_mode) == 0o600
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ValueError, match="within the disk"):
            disk.open(path)
    with pytest.raises(FileNotFoundError):
        disk.open("a/missing")
    assert disk.list("nowhere") == []
    assert disk.list("a") == ["b"]
    assert disk.free_bytes() > 0


def test_a_file_reads_writes_and_grows(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    file = disk.open("f", create=True)
    file.allocate(10_000)
    file.allocate(5)
    assert file.size() == 10_000
    assert file.pread(20_000, 0) == bytes(10_000)
    beyond = (1 << 32) + 5
    file.pwrite(b"far", beyond)
    assert file.pread(100, beyond) == b"far"
    assert file.pread(100, beyond + 3) == b""
    file.truncate(3)
    assert file.size() == 3
    file.datasync()
    disk.rename("f", "g")
    disk.sync_dir("")
    assert not disk.exists("f")
    disk.remove("g")
    file.close()
    file.close()
    with pytest.raises(OSError) as closed:
        file.size()
    assert closed.value.errno == errno.EBADF


def test_the_real_clock_and_chance_are_what_they_say() -> None:
    clock, rng = RealClock(), RealRng()
    assert clock.monotonic() <= clock.monotonic()
    assert clock.wall_ms() > 1_700_000_000_000
    assert 0 <= rng.random() < 1
    assert len(rng.token(16)) == 16
    assert rng.token(16) != rng.token(16)
