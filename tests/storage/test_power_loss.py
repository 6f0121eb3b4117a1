"""What the disk may hold after a power loss is tried out, sector by sector."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_node.storage import environment
from agentmem_node.storage.checkpoint import DATA_NAME, FILE_NAME
from agentmem_node.storage.environment import CheckpointJob, Environment

SECTOR_BYTES = 512
MAP_BYTES = 16 << 20
Rows = dict[bytes, bytes]


class Machine:
    """An environment whose every state of the disk is kept, so that a power loss can mix them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.expected: dict[bytes, Rows] = {b"0": {}}  # state -> what it must hold
        self.rows: Rows = {}
        self.images: list[bytes] = []  # of the data file: the last synced one, and all since
        self.job: CheckpointJob | None = None
        self.has_run = False
        self.old_checkpoint = b""
        # Room beyond the data would only make the images large.
        monkeypatch.setattr(environment, "_GROW_BYTES_MIN", 0)
        self.env = Environment.create(folder, ["rows"], b"0", MAP_BYTES)
        self._started()

    def _started(self) -> None:
        self.number = int(self.env.durable_state)
        self.env.state = lambda: b"%d" % self.number
        self.images = [self._image()]

    def _image(self) -> bytes:
        return (self.folder / DATA_NAME).read_bytes()

    def write(self, rng: random.Random) -> None:
        """One transaction: puts of all sizes and deletes, then a commit."""
        db = self.env.db["rows"]
        for _ in range(rng.randrange(1, 12)):
            key = b"key%03d" % rng.randrange(60)
            if rng.random() < 0.3:
                self.env.txn.delete(key, db=db)
                self.rows.pop(key, None)
            else:
                value = rng.randbytes(rng.choice((3, 300, 1500, 9000)))
                self.env.txn.put(key, value, db=db)
                self.rows[key] = value
        self.number += 1
        self.expected[b"%d" % self.number] = dict(self.rows)
        self.env.commit()
        self.images.append(self._image())

    def begin(self) -> None:
        if self.job is None:
            self.job = self.env.begin_checkpoint()
            self.images.append(self._image())

    def run(self) -> None:
        """The job, in its thread: from here on the new checkpoint file may be there or not."""
        if self.job is not None and not self.has_run:
            # What was in the file when the sync began is on disk; what comes later, perhaps.
            self.images = [self._image()]
            self.old_checkpoint = (self.folder / FILE_NAME).read_bytes()
            self.job.run()
            self.has_run = True

    def done(self) -> None:
        if self.job is not None and self.has_run:
            self.env.checkpoint_done(self.job)
            self.job = None
            self.has_run = False

    def lose_power(self, rng: random.Random) -> None:
        """Stop, and leave on the disk any mixture of what was written since the last sync."""
        checkpoints = [(self.folder / FILE_NAME).read_bytes()]
        if self.has_run:
            # Within the job: after its sync, before or after its rename.
            checkpoints.append(self.old_checkpoint)
        images = [*self.images, self._image()]
        self.kill()
        (self.folder / DATA_NAME).write_bytes(mixture(images, rng))
        (self.folder / FILE_NAME).write_bytes(rng.choice(checkpoints))
        (self.folder / (FILE_NAME + ".new")).write_bytes(rng.randbytes(rng.randrange(200)))
        (self.folder / "lock.mdb").unlink()

    def restart(self) -> None:
        self.env = Environment(self.folder, ["rows"], MAP_BYTES)
        self._started()

    def kill(self) -> None:
        """Stop as kill -9 does: every write is in the file, no checkpoint is made."""
        self.job = None
        self.has_run = False
        self.env.close()

    def check(self) -> None:
        """The environment holds exactly what its checkpoint named."""
        self.rows = dict(self.expected[self.env.durable_state])
        assert dict(self.env.txn.cursor(db=self.env.db["rows"])) == self.rows


def mixture(images: list[bytes], rng: random.Random) -> bytes:
    """Of each sector, any of the images' contents; of the length, any too."""
    size = rng.choice([len(image) for image in images])
    size = max(size, len(images[0]))
    if rng.random() < 0.2:
        # All or nothing of what came after: the two ends that chance seldom meets.
        whole = rng.choice(images)
        return whole[:size].ljust(size, b"\0")
    sectors = []
    for start in range(0, size, SECTOR_BYTES):
        image = rng.choice(images)
        sectors.append(image[start : start + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0"))
    return b"".join(sectors)[:size]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 32))
def test_any_mixture_of_sectors_leads_back_to_the_checkpoint(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "shard"
    shutil.rmtree(folder, ignore_errors=True)
    machine = Machine(folder, monkeypatch)
    # Drawn from the seed: hypothesis favours short lists, and pages are overwritten in long ones.
    for step in [*rng.choices("wbrdpk", weights=(70, 9, 9, 9, 2, 2), k=60), "p"]:
        if step == "w":
            machine.write(rng)
        elif step == "b":
            machine.begin()
        elif step == "r":
            machine.run()
        elif step == "d":
            machine.done()
        else:
            if step == "p":
                machine.lose_power(rng)
            else:
                machine.kill()
            machine.restart()
            machine.check()
    machine.env.close()


class _NoPin:
    def abort(self) -> None:
        pass


# Another process: LMDB may well crash on what it finds.
READ_BACK = """
import hashlib, sys
from pathlib import Path
from agentmem_node.storage.environment import Environment
env = Environment(Path(sys.argv[1]), ["rows"], 16 << 20)
rows = sorted(env.txn.cursor(db=env.db["rows"]))
print(hashlib.sha256(repr(rows).encode()).hexdigest())
"""


def test_without_the_pinned_reader_even_a_kill_would_lose_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests here can fail: LMDB overwrites a snapshot as soon as nobody reads it."""

    def survives(name: str, is_pinned: bool) -> bool:
        rng = random.Random(3)
        machine = Machine(tmp_path / name, monkeypatch)
        machine.write(rng)
        machine.begin()
        machine.run()
        machine.done()
        rows = repr(sorted(machine.rows.items())).encode()
        if not is_pinned:
            machine.env._pin.abort()
            machine.env._pin = _NoPin()
        for _ in range(10):
            machine.write(rng)
        machine.kill()
        read = subprocess.run(
            [sys.executable, "-c", READ_BACK, str(machine.folder)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        return read.stdout.strip() == hashlib.sha256(rows).hexdigest()

    assert survives("pinned", is_pinned=True)
    assert not survives("unpinned", is_pinned=False)


def test_pages_of_the_checkpoint_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side of it: spoiling every page that changed since leaves the snapshot whole."""
    rng = random.Random(5)
    machine = Machine(tmp_path / "shard", monkeypatch)
    for _ in range(10):
        machine.write(rng)
    machine.begin()
    machine.run()
    machine.done()
    before = machine._image()
    for _ in range(30):
        machine.write(rng)
    after = machine._image()
    machine.env.close()
    page = 4096
    spoiled = b"".join(
        before[at : at + page]
        if before[at : at + page] == after[at : at + page]
        else rng.randbytes(page)
        for at in range(0, len(before), page)
    )
    assert spoiled != before
    (tmp_path / "shard" / DATA_NAME).write_bytes(spoiled)
    machine.restart()
    machine.check()
    machine.env.close()
