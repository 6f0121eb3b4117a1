"""The journal while it runs: what is kept, what is durable when, and where the bytes go."""

from __future__ import annotations

import errno
import random

import pytest

from agentmem_chaos.sim.disk import SimDisk
from agentmem_cluster.journal.journal import FlushJob, Journal
from agentmem_cluster.raft.api import Entry

SEGMENT_BYTES = 4096


def disk() -> SimDisk:
    return SimDisk(random.Random(7))


def open_journal(on: SimDisk, **options: int) -> Journal:
    return Journal.open(on, segment_bytes=SEGMENT_BYTES, **options)


def entries(first: int, count: int, term: int = 1, size: int = 50) -> list[Entry]:
    return [
        Entry(first + i, term, b"%d/%d " % (first + i, term) + b"." * size) for i in range(count)
    ]


def flush(journal: Journal) -> None:
    job = journal.begin_flush()
    if job is not None:
        job.run()
        journal.flushed(job)


def indexes(found: list[Entry]) -> list[int]:
    return [entry.index for entry in found]


def test_a_fresh_log_is_empty_and_a_written_one_says_so() -> None:
    journal = open_journal(disk())
    log = journal.group("s00", 1)
    assert (log.first_index, log.last_index, log.durable_index, log.base_term) == (1, 0, 0, 0)
    assert log.term_at(0) == 0
    log.append(entries(1, 3))
    assert (log.last_index, log.durable_index) == (3, 0)
    flush(journal)
    assert log.durable_index == 3
    assert log.slice(1, 3, 1 << 20) == entries(1, 3)
    assert log.command_at(2) == entries(2, 1)[0]
    assert journal.begin_flush() is None


def test_entries_that_do_not_follow_are_refused() -> None:
    log = open_journal(disk()).group("s00", 1)
    log.append(entries(1, 3, term=4))
    for wrong in (entries(3, 1, 4), entries(5, 1, 4), entries(4, 1, 3)):
        with pytest.raises(ValueError, match="s00@1"):
            log.append(wrong)
    with pytest.raises(IndexError):
        log.term_at(4)


def test_a_second_vote_in_a_term_is_refused() -> None:
    journal = open_journal(disk())
    log = journal.group("s00", 1)
    log.set_vote(3, None)
    log.set_vote(3, "n2")
    assert not log.hard_state_durable
    flush(journal)
    assert log.hard_state_durable
    log.set_vote(3, "n2")
    for term, vote in ((3, "n1"), (2, "n2"), (3, None)):
        with pytest.raises(ValueError, match="voted"):
            log.set_vote(term, vote)


def test_one_flush_serves_every_group() -> None:
    on = disk()
    journal = open_journal(on)
    flush(journal)
    logs = [journal.group(f"s{i:02d}", 1) for i in range(20)]
    for log in logs:
        log.append(entries(1, 2))
        log.set_vote(1, "n1")
    before = on.syncs
    job = journal.begin_flush()
    assert job is not None
    job.run()
    journal.flushed(job)
    assert on.syncs - before <= 2  # the segment, and its name when it is new
    assert all(log.durable_index == 2 and log.hard_state_durable for log in logs)


def test_what_is_appended_during_a_flush_waits_for_the_next() -> None:
    journal = open_journal(disk())
    log = journal.group("s00", 1)
    log.append(entries(1, 2))
    job = journal.begin_flush()
    assert job is not None
    log.append(entries(3, 2))
    log.set_vote(1, "n3")
    with pytest.raises(RuntimeError):
        journal.begin_flush()
    job.run()
    journal.flushed(job)
    assert log.durable_index == 2
    assert not log.hard_state_durable
    flush(journal)
    assert log.durable_index == 4


def test_entries_replaced_during_their_flush_are_not_durable() -> None:
    journal = open_journal(disk())
    log = journal.group("s00", 1)
    log.append(entries(1, 4, term=1))
    job = journal.begin_flush()
    assert job is not None
    log.truncate_from(3)
    log.append(entries(3, 3, term=2))
    job.run()
    journal.flushed(job)
    assert log.durable_index == 2
    flush(journal)
    assert log.durable_index == 5
    assert [entry.term for entry in log.slice(1, 5, 1 << 20)] == [1, 1, 2, 2, 2]


def test_truncated_entries_stay_gone_after_a_restart() -> None:
    on = disk()
    journal = open_journal(on)
    log = journal.group("s00", 1)
    log.append(entries(1, 6, term=1))
    flush(journal)
    log.truncate_from(4)
    assert (log.last_index, log.durable_index, log.term_at(3)) == (3, 3, 1)
    log.append(entries(4, 1, term=3))
    flush(journal)
    log = open_journal(on).group("s00", 1)
    assert log.slice(1, 9, 1 << 20) == [*entries(1, 3, 1), *entries(4, 1, 3)]
    assert log.term_at(4) == 3


def test_a_slice_keeps_within_its_bytes_but_has_one_entry() -> None:
    journal = open_journal(disk(), window_bytes=0)
    log = journal.group("s00", 1)
    for first in range(1, 31, 3):
        log.append(entries(first, 3, size=100))
        flush(journal)
    assert indexes(log.slice(5, 30, 1)) == [5]
    assert indexes(log.slice(5, 30, 330)) == [5, 6, 7]
    assert indexes(log.slice(29, 99, 1 << 20)) == [29, 30]
    assert log.slice(31, 40, 1 << 20) == []


def test_entries_outside_the_window_are_read_from_the_disk() -> None:
    journal = open_journal(disk(), window_bytes=1000)
    log = journal.group("s00", 1)
    for first in range(1, 201, 4):
        log.append(entries(first, 4, term=first))
        flush(journal)
    assert len(log._window) < 10
    assert indexes(log.slice(1, 200, 1 << 20)) == list(range(1, 201))
    assert [log.command_at(i).term for i in range(1, 201)] == [
        first for first in range(1, 201, 4) for _ in range(4)
    ]


def test_the_window_keeps_what_the_disk_does_not_have() -> None:
    journal = open_journal(disk(), window_bytes=1000)
    log = journal.group("s00", 1)
    log.append(entries(1, 100))
    assert indexes(log.slice(1, 100, 1 << 20)) == list(range(1, 101))


def test_compaction_survives_a_restart_and_frees_whole_segments() -> None:
    on = disk()
    journal = open_journal(on)
    log = journal.group("s00", 1)
    for first in range(1, 401, 4):
        log.append(entries(first, 4, term=2))
        flush(journal)
    full = journal.bytes_used
    with pytest.raises(ValueError, match="durable"):
        log.compact_to(401)
    log.compact_to(390)
    assert (log.first_index, log.base_term, log.term_at(390)) == (391, 2, 2)
    with pytest.raises(IndexError):
        log.slice(390, 400, 1 << 20)
    for _ in range(20):
        journal.reclaim()
        flush(journal)
    assert journal.bytes_used < full / 4
    log = open_journal(on).group("s00", 1)
    assert (log.first_index, log.last_index, log.base_term) == (391, 400, 2)
    assert log.slice(391, 400, 1 << 20) == entries(391, 10, 2)


def test_an_idle_group_does_not_pin_segments() -> None:
    on = disk()
    journal = open_journal(on, window_bytes=500)
    idle, busy = journal.group("s01", 1), journal.group("s02", 1)
    idle.append(entries(1, 5, term=1))
    idle.set_vote(7, "n3")
    for first in range(1, 1001, 5):
        busy.append(entries(first, 5))
        flush(journal)
        if first % 20 == 1:
            busy.compact_to(busy.durable_index)
            journal.reclaim()
    assert journal.bytes_used <= 6 * SEGMENT_BYTES
    assert idle.slice(1, 5, 1 << 20) == entries(1, 5)
    idle = open_journal(on).group("s01", 1)
    assert idle.slice(1, 5, 1 << 20) == entries(1, 5)
    assert (idle.term, idle.vote) == (7, "n3")


def test_relocated_entries_can_be_read_before_they_are_flushed() -> None:
    journal = open_journal(disk(), window_bytes=0)
    idle, busy = journal.group("s01", 1), journal.group("s02", 1)
    idle.append(entries(1, 5))
    for first in range(1, 301, 5):
        busy.append(entries(first, 5))
        flush(journal)
    busy.compact_to(300)
    flush(journal)
    journal.reclaim()
    assert idle.slice(1, 5, 1 << 20) == entries(1, 5)
    flush(journal)
    assert idle.slice(1, 5, 1 << 20) == entries(1, 5)


def test_a_dropped_group_is_gone_and_may_come_again() -> None:
    on = disk()
    journal = open_journal(on)
    journal.group("s00", 1).append(entries(1, 5))
    journal.group("s00", 2).append(entries(1, 2))
    flush(journal)
    journal.drop_group("s00", 1)
    assert journal.groups() == [("s00", 2)]
    assert journal.group("s00", 1).last_index == 0
    flush(journal)
    journal = open_journal(on)
    assert journal.groups() == [("s00", 1), ("s00", 2)]
    assert journal.group("s00", 1).last_index == 0
    assert journal.group("s00", 2).last_index == 2


def test_a_block_larger_than_a_segment_has_a_segment_of_its_own() -> None:
    on = disk()
    journal = open_journal(on)
    log = journal.group("s00", 1)
    log.append(entries(1, 3, size=3 * SEGMENT_BYTES))
    flush(journal)
    log.append(entries(4, 1))
    flush(journal)
    log = open_journal(on).group("s00", 1)
    assert indexes(log.slice(1, 4, 1 << 20)) == [1, 2, 3, 4]


@pytest.mark.parametrize("at_roll", [False, True])
def test_a_full_disk_keeps_the_buffers_until_there_is_room(at_roll: bool) -> None:
    on = disk()
    journal = open_journal(on)
    log = journal.group("s00", 1)
    log.append(entries(1, 3))
    flush(journal)
    on.full = True
    log.append(entries(4, 40 if not at_roll else 80))
    log.set_vote(5, "n2")
    for _ in range(3):
        with pytest.raises(OSError, match="No space") as refused:
            journal.begin_flush()
        assert refused.value.errno == errno.ENOSPC
        log.append(entries(log.last_index + 1, 1))
        assert log.durable_index == 3
        assert log.command_at(4) == entries(4, 1)[0]
    on.full = False
    flush(journal)
    assert log.durable_index == log.last_index
    again = open_journal(on).group("s00", 1)
    assert again.slice(1, 999, 1 << 20) == log.slice(1, 999, 1 << 20)
    assert (again.term, again.vote) == (5, "n2")


def test_a_crash_on_a_full_disk_keeps_what_was_acknowledged() -> None:
    for seed in range(20):
        on = SimDisk(random.Random(seed))
        journal = open_journal(on)
        log = journal.group("s00", 1)
        log.append(entries(1, 3))
        flush(journal)
        on.full = True
        log.append(entries(4, 9))
        with pytest.raises(OSError, match="No space"):
            journal.begin_flush()
        on.kill()
        on.full = False
        log = open_journal(on).group("s00", 1)
        assert log.slice(1, 99, 1 << 20) == entries(1, 3)


def test_a_sync_without_room_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    on = disk()
    journal = open_journal(on)
    log = journal.group("s00", 1)
    log.append(entries(1, 3))
    job = journal.begin_flush()
    assert job is not None

    def no_room(path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(on, "before_sync", no_room)
        with pytest.raises(OSError, match="No space"):
            job.run()
    assert log.durable_index == 0
    log.append(entries(4, 1))
    again = journal.begin_flush()
    assert again is job
    job.run()
    journal.flushed(job)
    assert log.durable_index == 3
    flush(journal)
    assert log.durable_index == 4


def test_a_flush_that_did_not_run_cannot_count() -> None:
    journal = open_journal(disk())
    journal.group("s00", 1).append(entries(1, 3))
    job = journal.begin_flush()
    assert isinstance(job, FlushJob)
    with pytest.raises(RuntimeError):
        journal.flushed(job)


def test_statistics_count_what_was_written() -> None:
    journal = open_journal(disk())
    journal.group("s00", 1).append(entries(1, 3))
    flush(journal)
    stats = journal.stats()
    assert stats.syncs == 1
    assert stats.written_bytes > 150
    assert stats.size_bytes == journal.bytes_used >= SEGMENT_BYTES
    assert stats.segments >= 1
