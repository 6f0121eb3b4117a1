"""The journal of a real process that ends at each of its failpoints."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agentmem_cluster.failpoints import POINTS, arm
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.realtime import RealDisk, RealFaults

SEGMENT_BYTES = 1 << 16
# Before these, what is at stake is read back from the disk; a crash there must not be the first.
AT_THE_START = ("journal.recovered",)

WRITER = """
import sys
from agentmem_cluster.failpoints import arm
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.realtime import RealDisk, RealFaults

arm(sys.argv[2], RealFaults())
journal = Journal.open(RealDisk(sys.argv[1]), segment_bytes=1 << 16)
log = journal.group("s00", 1)
print(log.last_index, flush=True)
for _ in range(int(sys.argv[3])):
    first = log.last_index + 1
    log.append([Entry(first + i, 1, b"%d " % (first + i) * 50) for i in range(7)])
    log.set_vote(log.term + 1, "n1")
    job = journal.begin_flush()
    job.run()
    journal.flushed(job)
    print(log.durable_index, flush=True)
    if log.durable_index - log.first_index > 400:
        log.compact_to(log.durable_index - 200)
        journal.reclaim()
"""


def write(folder: Path, plan: str, turns: int) -> tuple[int, int]:
    """Exit code, and the last index that was said to be durable."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), plan, str(turns)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    timer = threading.Timer(60, writer.kill)
    timer.start()
    durable = 0
    try:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.endswith("\n"):
                durable = int(line)
        return writer.wait(10), durable
    finally:
        timer.cancel()
        writer.kill()
        writer.wait(10)


@pytest.mark.process
@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith("journal.")])
def test_a_crash_within_a_flush_loses_nothing_that_was_durable(point: str, tmp_path: Path) -> None:
    durable = 0
    for turn, at in enumerate((1, 2)):
        if point in AT_THE_START:
            code, said = write(tmp_path, "", 40)
            assert code == 0
            durable = max(durable, said)
            at = 1
        code, said = write(tmp_path, f"{point}=crash@{at}", 1_500)
        assert code == -signal.SIGKILL, f"{point} was not passed in turn {turn}"
        durable = max(durable, said)
    code, said = write(tmp_path, "", 20)
    assert code == 0
    assert said >= durable + 7 * 20
    log = Journal.open(RealDisk(tmp_path), segment_bytes=SEGMENT_BYTES).group("s00", 1)
    assert log.last_index == said
    for entry in log.slice(log.first_index, log.last_index, 1 << 30):
        assert entry.command == b"%d " % entry.index * 50


@pytest.mark.parametrize(
    "point", ["journal.before_write", "journal.after_write", "journal.before_sync"]
)
def test_a_flush_that_found_no_room_is_done_again_with_the_same_content(
    point: str, tmp_path: Path
) -> None:
    journal = Journal.open(RealDisk(tmp_path), segment_bytes=SEGMENT_BYTES)
    log = journal.group("s00", 1)
    try:
        refused = 0
        arm(f"seed=7;{point}=error:ENOSPC%0.3", RealFaults())
        for first in range(1, 1_000, 7):
            log.append([Entry(first + i, 1, b"%d " % (first + i) * 50) for i in range(7)])
            while log.durable_index < first + 6:
                try:
                    job = journal.begin_flush()
                    assert job is not None
                    job.run()
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    refused += 1
                else:
                    journal.flushed(job)
        assert refused > 10
    finally:
        arm("", RealFaults())
        journal.close()
    again = Journal.open(RealDisk(tmp_path), segment_bytes=SEGMENT_BYTES).group("s00", 1)
    assert again.last_index == log.last_index
    for entry in again.slice(1, again.last_index, 1 << 30):
        assert entry.command == b"%d " % entry.index * 50
