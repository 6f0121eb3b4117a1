"""The simulated disk keeps exactly what a real one promises, and no more."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_chaos.sim.disk import SimDisk


def disk(seed: int = 1, **kind: bool) -> SimDisk:
    return SimDisk(random.Random(seed), **kind)


def content(of: SimDisk, path: str) -> bytes:
    file = of.open(path)
    return file.pread(file.size(), 0)


def durable_file(of: SimDisk, path: str, data: bytes) -> None:
    of.make_dir("d")
    of.sync_dir("")
    file = of.open(path, create=True)
    file.pwrite(data, 0)
    file.datasync()
    of.sync_dir("d")


def test_what_was_synced_survives_a_power_loss() -> None:
    d = disk()
    durable_file(d, "d/f", b"kept")
    d.power_loss()
    assert content(d, "d/f") == b"kept"


def test_what_was_written_survives_a_kill_but_the_dead_process_files_do_not_work() -> None:
    d = disk()
    file = d.open("f", create=True)
    file.pwrite(b"in the page cache", 0)
    d.kill()
    assert content(d, "f") == b"in the page cache"
    with pytest.raises(OSError) as error:
        file.pwrite(b"from the grave", 0)
    assert error.value.errno == errno.EBADF


def test_a_synced_file_whose_name_was_not_synced_may_be_gone() -> None:
    gone = 0
    for seed in range(20):
        d = disk(seed)
        file = d.open("f", create=True)
        file.pwrite(b"x", 0)
        file.datasync()
        d.power_loss()
        gone += not d.exists("f")
    assert 0 < gone < 20


def test_a_rename_is_all_or_nothing_through_a_power_loss() -> None:
    seen = set()
    for seed in range(30):
        d = disk(seed)
        durable_file(d, "d/f", b"old")
        file = d.open("d/f.new", create=True)
        file.pwrite(b"new", 0)
        file.datasync()
        d.rename("d/f.new", "d/f")
        d.power_loss()
        seen.add(content(d, "d/f"))
    assert seen == {b"old", b"new"}


@given(
    seed=st.integers(0, 10_000),
    writes=st.lists(st.tuples(st.integers(0, 2_000), st.binary(min_size=1, max_size=1_500))),
)
def test_an_unsynced_byte_after_a_power_loss_is_one_that_was_written_there_or_was_there_before(
    seed: int, writes: list[tuple[int, bytes]]
) -> None:
    d = disk(seed)
    before = bytes(range(1, 251)) * 8
    durable_file(d, "d/f", before)
    possible: list[set[int]] = [{byte} for byte in before]
    file = d.open("d/f")
    for offset, data in writes:
        file.pwrite(data, offset)
        possible += [{0} for _ in range(offset + len(data) - len(possible))]
        for position, byte in enumerate(data, start=offset):
            possible[position].add(byte)
    d.power_loss()
    after = content(d, "d/f")
    assert len(before) <= len(after) <= len(possible)
    assert all(byte in allowed for byte, allowed in zip(after, possible, strict=False))


def test_writes_may_reach_the_platter_out_of_order() -> None:
    later_without_earlier = 0
    for seed in range(60):
        d = disk(seed)
        durable_file(d, "d/f", bytes(1024))
        file = d.open("d/f")
        file.pwrite(b"a" * 512, 0)
        file.pwrite(b"b" * 512, 512)
        d.power_loss()
        after = content(d, "d/f")
        later_without_earlier += after[512] == ord("b") and after[0] != ord("a")
    assert later_without_earlier > 0


def test_a_failed_sync_loses_what_it_was_for_and_the_next_one_does_not_bring_it_back() -> None:
    d = disk()
    durable_file(d, "d/f", b"old")
    file = d.open("d/f")
    file.pwrite(b"new", 0)
    d.fail_next_sync = True
    with pytest.raises(OSError):
        file.datasync()
    file.datasync()
    d.power_loss()
    assert content(d, "d/f") == b"old"


def test_a_full_disk_takes_part_of_a_write_and_says_so() -> None:
    d = disk()
    file = d.open("f", create=True)
    d.full = True
    with pytest.raises(OSError) as error:
        file.pwrite(b"0123456789", 0)
    assert error.value.errno == errno.ENOSPC
    assert b"0123456789".startswith(content(d, "f"))
    d.full = False
    file.pwrite(b"0123456789", 0)
    assert content(d, "f") == b"0123456789"


def test_a_disk_that_lies_about_syncs_loses_what_it_confirmed() -> None:
    lost = 0
    for seed in range(20):
        d = disk(seed, honours_sync=False)
        durable_file(d, "d/f", b"confirmed")
        d.power_loss()
        lost += not d.exists("d/f") or content(d, "d/f") != b"confirmed"
    assert lost > 10


def test_the_platter_shows_what_is_durable_and_does_not_touch_the_disk() -> None:
    d = disk()
    durable_file(d, "d/f", b"old")
    d.open("d/f").pwrite(b"new", 0)
    d.open("d/g", create=True).pwrite(b"unsynced name", 0)
    platter = d.platter()
    assert content(platter, "d/f") == b"old"
    assert not platter.exists("d/g")
    platter.open("d/f").pwrite(b"zzz", 0)
    assert content(d, "d/f") == b"new"
    d.power_loss()
    assert content(d, "d/f") in (b"old", b"new")
