"""A data directory that an older version has run on, before this one or after it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.realtime import RealDisk, RealRng
from agentmem_node.service.admission import open_record
from agentmem_node.service.datadir import FORMAT, DataDir, DataDirError

LOGS = [(GROUP_META, 1), ("s00", 1), ("s01", 1)]


def test_groups_that_an_older_version_left_in_the_journal_are_held(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    record = open_record(disk, LOGS, RealRng())
    assert record.is_admitted
    assert {group: held.epoch for group, held in record.held.items()} == dict(LOGS)
    assert open_record(disk, LOGS, RealRng()) == record


def test_so_they_are_when_this_version_was_started_before_it_on_an_empty_disk(
    tmp_path: Path,
) -> None:
    """An upgrade that was tried, given up before the node took part in anything, and tried again:
    what the node has voted and stored meanwhile must not be taken for a lost disk's."""
    disk = RealDisk(tmp_path)
    first = open_record(disk, [], RealRng())
    assert not first.is_admitted
    record = open_record(disk, LOGS, RealRng())
    assert record.is_admitted
    assert record.held["s00"] == Held(1, "s00-e1")
    assert record.incarnation == first.incarnation
    assert LocalRecord.load(disk) == record


def test_an_epoch_that_this_version_has_left_is_not_held_again(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    record = open_record(disk, LOGS, RealRng())
    record.close("s00", 1)
    record.hold("s01", Held(2, "s01-e1", 7, 1))
    record.save(disk)
    assert open_record(disk, LOGS, RealRng()) == record


def test_a_new_directory_can_be_given_back_to_the_version_before(tmp_path: Path) -> None:
    DataDir.open(tmp_path, "n1", "north").close()
    assert format_of(tmp_path) == 1


def test_a_format_that_is_required_stays_required(tmp_path: Path) -> None:
    with DataDir.open(tmp_path, "n1", "north") as opened:
        opened.require(FORMAT)
        assert format_of(tmp_path) == FORMAT
        opened.require(1)
    with DataDir.open(tmp_path, "n1", "north") as opened:
        opened.require(1)
    assert format_of(tmp_path) == FORMAT
    with pytest.raises(DataDirError, match="belongs to node 'n1'"):
        DataDir.open(tmp_path, "n2", "north")


def test_a_directory_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with DataDir.open(tmp_path, "n1", "north") as opened:
        opened.require(FORMAT + 1)
    with pytest.raises(DataDirError, match=f"format {FORMAT + 1}; this one knows {FORMAT}"):
        DataDir.open(tmp_path, "n1", "north")


def format_of(path: Path) -> int:
    return int(msgspec.json.decode((path / "node.json").read_bytes())["format"])
