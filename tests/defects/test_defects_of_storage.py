"""D2, D3, D4, D6, D11: what the released library's journal and dumps lose, and ours do not."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pysyncobj.journal import FileJournal, ResizableFile

from agentmem_chaos.sim.disk import SimDisk, SimFile
from agentmem_cluster.journal.format import JournalCorrupt
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.journal.runs import RunIndex
from agentmem_cluster.raft.api import Applied, Entry


def spin(node: Any, ticks: int = 12, advance_s: float = 0.5) -> None:
    for _ in range(ticks):
        node.clock.now_s += advance_s
        node["A"].doTick()


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


# -- D2: a dump whose writer outlives the process --


class WaitsForPermission:
    """Stands for a state that takes a while to serialize: its writer waits for a file."""

    def __init__(self, permission: Path) -> None:
        self.permission = permission

    def __reduce__(self) -> Any:
        until(self.permission.exists, "permission")
        return dict, ()


def test_d02_released_a_dump_writer_that_outlives_kill_loses_what_was_acknowledged_since(
    released: SimpleNamespace, tmp_path: Path
) -> None:
    files = {"journalFile": str(tmp_path / "journal"), "fullDumpFile": str(tmp_path / "dump")}
    before = released.cluster("A", **files)
    spin(before)
    before["A"].large = WaitsForPermission(tmp_path / "go")
    acknowledged: list[int] = []

    def put(first: int, last: int) -> None:
        for number in range(first, last):
            before["A"].put(
                number,
                callback=lambda result, error: acknowledged.append(result) if not error else 0,
            )
        spin(before)

    put(0, 100)
    before["A"].forceLogCompaction()
    spin(before, ticks=1)  # here the writer is forked
    put(100, 500)
    assert acknowledged == list(range(500))
    # kill -9 of the process leaves its page cache, so its files as they are now; the orphaned
    # writer then ends, and renames its dump into place.
    (tmp_path / "go").touch()
    until((tmp_path / "dump").exists, "dump")

    after = released.cluster("A", **files)
    spin(after)
    assert len(after["A"].applied) == 100, "400 acknowledged commands are gone"


@pytest.mark.parametrize("power_loss", [False, True])
@pytest.mark.parametrize("reached", ["begun", "written", "noted"])
def test_d02_ours_a_crash_around_a_checkpoint_loses_nothing(
    ours: Any, power_loss: bool, reached: str
) -> None:
    cluster = ours("A", checkpoint_entries=100)
    node = cluster["A"]
    cluster.elect("A")
    put(node, 0, 100)
    (checkpoint,) = node.core.take_checkpoints()
    put(node, 100, 500)
    if reached != "begun":
        checkpoint.job.run()
    if reached == "noted":
        node.core.checkpointed(checkpoint)
        node.tick()
    node.restart(power_loss=power_loss)
    cluster.elect("A")
    assert node.machine.commands == [b"%d" % number for number in range(500)]


def put(node: Any, first: int, last: int) -> None:
    outcomes = [node.propose(b"%d" % number) for number in range(first, last)]
    node.tick()
    assert all(isinstance(outcome[0], Applied) for outcome in outcomes), "all are acknowledged"


# -- D3: a journal without dumps --


def test_d03_released_compaction_without_a_dump_file_then_restart_loses_all_state(
    released: SimpleNamespace, tmp_path: Path
) -> None:
    files = {"journalFile": str(tmp_path / "journal"), "logCompactionMinEntries": 100}
    before = released.cluster("A", **files)
    spin(before)
    for number in range(500):
        before["A"].put(number)
    spin(before)
    assert len(before["A"].applied) == 500

    after = released.cluster("A", **files)
    spin(after)
    after["A"].put("one more")
    spin(after)
    assert after["A"].applied == [] or after["A"].applied == ["one more"]
    assert after["A"].raftLastApplied < after["A"].raftCommitIndex, "and it is stuck there"


def test_d03_ours_state_outlives_compaction_and_a_power_loss(ours: Any) -> None:
    cluster = ours("A", checkpoint_entries=100, tail_bytes=1)
    node = cluster["A"]
    cluster.elect("A")
    # Large enough that the log forgets what is durable in the state: it counts in quarters of MB.
    items = [b"%d" % number + bytes(2_000) for number in range(500)]
    for item in items:
        outcome = node.propose(item)
        node.tick()
        assert isinstance(outcome[0], Applied)
        for checkpoint in node.core.take_checkpoints():
            checkpoint.job.run()
            node.core.checkpointed(checkpoint)
    node.tick()
    assert node.log.first_index > 200, "most of the log is gone"
    node.restart(power_loss=True)
    cluster.elect("A")
    assert node.machine.commands == items
    put(node, 500, 501)


# -- D4: compaction in place --


def test_d04_released_a_kill_during_compaction_loses_the_entries_that_were_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = FileJournal(str(tmp_path / "journal"))
    for index in range(1, 1_001):
        journal.add(b"\x00command", index, 1)

    class Killed(BaseException):
        pass

    added = 0
    add = FileJournal.add

    def add_until_killed(self: Any, *entry: Any) -> None:
        nonlocal added
        added += 1
        if added > 100:
            raise Killed
        add(self, *entry)

    monkeypatch.setattr(FileJournal, "add", add_until_killed)
    with pytest.raises(Killed):
        journal.deleteEntriesTo(200)  # 800 acknowledged entries are to be kept
    shutil.copytree(tmp_path, tmp_path / "after", dirs_exist_ok=True)
    assert len(FileJournal(str(tmp_path / "after" / "journal"))) == 100


class CrashingDisk(SimDisk):
    """Loses power before its nth change."""

    def __init__(self, crash_at: int) -> None:
        super().__init__(random.Random(crash_at))
        self.crash_at = crash_at
        self.changes = 0

    def count(self) -> None:
        self.changes += 1
        if self.changes == self.crash_at:
            raise PowerIsGone


class PowerIsGone(BaseException):
    pass


def test_d04_ours_a_power_loss_at_any_step_of_compaction_keeps_every_entry_that_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def counted(method: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            disk = getattr(self, "_disk", self)
            if isinstance(disk, CrashingDisk):
                disk.count()
            return method(self, *arguments, **options)

        return call

    for cls, names in (
        (SimFile, ("pwrite", "datasync", "allocate", "truncate")),
        (SimDisk, ("rename", "remove", "sync_dir")),
    ):
        for name in names:
            monkeypatch.setattr(cls, name, counted(getattr(cls, name)))

    steps = 0
    for crash_at in range(200):
        disk = CrashingDisk(crash_at=0)
        journal = Journal.open(disk, segment_bytes=4_096)
        log, idle = journal.group("busy", 1), journal.group("idle", 1)
        idle.append([Entry(1, 1, b"kept for ever")])
        for index in range(1, 101):
            log.append([Entry(index, 1, b"%d" % index + bytes(150))])
            flush(journal)
        disk.changes, disk.crash_at = 0, crash_at
        try:
            log.compact_to(60)
            flush(journal)
            journal.reclaim()
            flush(journal)
            journal.reclaim()
            flush(journal)
            steps = disk.changes
        except PowerIsGone:
            pass
        disk.crash_at = 0
        disk.power_loss()
        after = Journal.open(disk, segment_bytes=4_096)
        kept = after.group("busy", 1)
        assert kept.first_index in (1, 61) and kept.last_index == 100, crash_at
        assert [e.command[:3].rstrip(b"\0") for e in kept.slice(61, 100, 1 << 20)] == [
            b"%d" % index for index in range(61, 101)
        ]
        assert after.group("idle", 1).command_at(1).command == b"kept for ever"
        if crash_at > steps > 0:
            break
    assert steps >= 6, "compaction did something, and every step of it was cut"


def flush(journal: Journal) -> None:
    job = journal.begin_flush()
    if job is not None:
        job.run()
        journal.flushed(job)


# -- D6: no checksum, 32-bit offsets, a file that never shrinks, the log in memory --


def test_d06_released_a_flipped_byte_is_accepted_silently(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = FileJournal(str(path))
    for index in range(1, 51):
        journal.add(b"\x00" + b"x" * 90, index, 1)
    end = journal._FileJournal__currentOffset
    journal._destroy()
    with path.open("r+b") as file:
        file.seek(end - 30)
        file.write(b"Z")
    reopened = FileJournal(str(path))
    assert len(reopened) == 50
    assert b"Z" in reopened[-1][0]


def test_d06_released_an_offset_beyond_4_gib_cannot_be_written(tmp_path: Path) -> None:
    journal = FileJournal(str(tmp_path / "journal"))
    journal._FileJournal__currentOffset = 2**32 - 100  # the file stays sparse
    with pytest.raises(struct.error):
        journal.add(b"x" * 200, 1, 1)


def test_d06_released_the_file_never_shrinks_and_the_log_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = FileJournal(str(path))
    for index in range(1, 2_001):
        journal.add(b"x" * 1_000, index, 1)
    size_bytes = path.stat().st_size
    assert sum(len(command) for command, _, _ in journal[:]) == 2_000_000
    journal.deleteEntriesTo(1_990)
    assert path.stat().st_size == size_bytes


@pytest.mark.parametrize("bit", range(8))
def test_d06_ours_a_flipped_bit_in_what_was_acknowledged_is_refused_loudly(bit: int) -> None:
    disk = SimDisk(random.Random(1))
    journal = Journal.open(disk)
    log = journal.group("g", 1)
    for index in range(1, 51):
        log.append([Entry(index, 1, b"x" * 90)])
        flush(journal)
    (segment,) = [name for name in disk.list("journal") if name.endswith(".seg")]
    file = disk.open(f"journal/{segment}")
    at = file.pread(file.size(), 0).index(b"x" * 90, 3_000) + 30
    file.pwrite(bytes([ord("x") ^ 1 << bit]), at)
    with pytest.raises(JournalCorrupt, match="may have been acknowledged") as refusal:
        Journal.open(disk)
    assert refusal.value.file.endswith(segment)


def test_d06_ours_says_where_entries_stand_in_64_bits() -> None:
    runs = RunIndex()
    assert runs.segment.itemsize == runs.offset.itemsize == 8


def test_d06_ours_gives_space_back_and_reads_old_entries_from_disk() -> None:
    disk = SimDisk(random.Random(1))
    journal = Journal.open(disk, segment_bytes=64 << 10, window_bytes=20_000)
    log = journal.group("g", 1)
    for index in range(1, 2_001):
        log.append([Entry(index, 1, b"%4d" % index + bytes(996))])
        flush(journal)
    assert len(log._window) < 30, "of 2,000 entries"
    assert log.command_at(3).command[:4] == b"   3"
    used = journal.bytes_used
    assert used > 2_000_000
    log.compact_to(1_990)
    for _ in range(80):
        flush(journal)
        journal.reclaim()
    assert journal.bytes_used < used / 8


# -- D11: nothing is ever synced --


def test_d11_released_a_command_is_acknowledged_without_any_sync(
    released: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *_, name=name: synced.append(name))
    monkeypatch.setattr(ResizableFile, "flush", lambda self: synced.append("msync"))
    node = released.cluster("A", journalFile=str(tmp_path / "journal"))
    spin(node)
    acknowledged: list[int] = []
    node["A"].put(1, callback=lambda result, error: acknowledged.append(error))
    spin(node)
    assert acknowledged == [0]
    assert synced == []


def test_d11_ours_nothing_is_acknowledged_that_a_power_loss_takes_back(ours: Any) -> None:
    cluster = ours("ABC")
    a = cluster["A"]
    cluster.elect("A")
    outcome = a.propose(b"acknowledged")
    ready = a.tick(sync=False)
    cluster.deliver("A", "B")
    held_back = cluster["B"].tick(sync=False)
    cluster.deliver("B", "A")
    a.tick(sync=False)
    assert ready is not None and held_back is not None
    assert outcome == [], "two have it, none has synced it"
    a.finish(ready)
    assert outcome == [], "one has synced it"
    cluster["B"].finish(held_back)
    cluster.deliver("B", "A")
    a.tick()
    assert isinstance(outcome[0], Applied)

    for name in "ABC":
        cluster[name].restart(power_loss=True)
    cluster.elect("B")
    cluster.settle(rounds=20)
    assert [cluster[name].machine.commands for name in "ABC"] == [[b"acknowledged"]] * 3
