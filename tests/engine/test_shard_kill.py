"""kill -9 at any moment: the next start is at the checkpoint, and replay brings everything back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem_node.engine.shard import Shard
from tests.engine.commands import DIM, batches

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = 400
WORKER = """
import sys
from pathlib import Path
from threading import Thread
from agentmem_node.engine import shard as shard_module
from agentmem_node.engine.shard import Shard
from tests.engine.commands import DIM, batches

# Commits every few batches, and checkpoints that run beside the applying, in their thread.
shard_module._COMMIT_BYTES = 1 << 20
shard = Shard.open(Path(sys.argv[1]), "s00", dim=DIM)
job = thread = None
for entry in batches(1, int(sys.argv[2])):
    shard.apply([entry])
    if thread is not None and not thread.is_alive():
        shard.checkpoint_done(job)
        thread = None
    if thread is None:
        job = shard.checkpoint()
        thread = Thread(target=job.run)
        thread.start()
    print(shard.applied_index, shard.durable_index, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("killed_at", [1, 37, 150, ENTRIES])
def test_after_a_kill_the_checkpoint_and_the_journal_give_the_same_shard(
    killed_at: int, tmp_path: Path
) -> None:
    folder = tmp_path / "s00"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(ENTRIES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert worker.stdout is not None
        durable = 0
        for line in worker.stdout:
            applied, durable = map(int, line.split())
            if applied >= killed_at:
                break
        os.kill(worker.pid, signal.SIGKILL)
    finally:
        worker.kill()
        worker.communicate(timeout=20)

    entries = batches(1, ENTRIES)
    untouched = Shard.open(tmp_path / "untouched", "s00", dim=DIM)
    untouched.apply(entries)
    shard = Shard.open(folder, "s00", dim=DIM)
    # A checkpoint whose rename happened just before the kill may be newer than the last report.
    assert durable <= shard.durable_index <= ENTRIES
    assert shard.applied_index == shard.durable_index
    shard.apply(entries[shard.applied_index :])
    assert shard.digest() == untouched.digest()
    assert shard.count() == untouched.count() == ENTRIES * 10
    newest = shard.list("acme", None, accept=None, after=None, limit=5000, now_ms=0)
    assert newest == untouched.list("acme", None, accept=None, after=None, limit=5000, now_ms=0)
    shard.close()
    untouched.close()
