"""D2, D3, D4, D6, D11: what the released library's journal and dumps lose, and ours do not."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pysyncobj.journal import FileJournal, ResizableFile


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
