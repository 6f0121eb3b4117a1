"""Crashes and damage: what was synced is there or the journal refuses; what was not may be cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_cluster.journal import format as fmt
from agentmem_cluster.journal.format import HEADER_BYTES, MAGIC
from agentmem_cluster.journal.journal import Journal, JournalCorrupt
from agentmem_cluster.raft.api import Entry

SEGMENT_BYTES = 2048


class MemoryFile:
    """A file of `MemoryDisk`: everything written is there at once."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    def pread(self, size_bytes: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + size_bytes])

    def pwrite(self, data: bytes, offset: int) -> None:
        self.allocate(offset + len(data))
        self.data[offset : offset + len(data)] = data

    def datasync(self) -> None: ...

    def allocate(self, size_bytes: int) -> None:
        self.data.extend(bytes(max(0, size_bytes - len(self.data))))

    def truncate(self, size_bytes: int) -> None:
        del self.data[size_bytes:]
        self.allocate(size_bytes)

    def size(self) -> int:
        return len(self.data)

    def close(self) -> None: ...


class MemoryDisk:
    """Files that a test can damage: `files` maps a path to its bytes."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {path: bytearray(data) for path, data in (files or {}).items()}

    def open(self, path: str, *, create: bool = False) -> MemoryFile:
        if path not in self.files and not create:
            raise FileNotFoundError(path)
        return MemoryFile(self.files.setdefault(path, bytearray()))

    def list(self, path: str) -> list[str]:
        return sorted(p.split("/")[1] for p in self.files if p.startswith(path + "/"))

    def exists(self, path: str) -> bool:
        return path in self.files or bool(self.list(path))

    def make_dir(self, path: str) -> None: ...

    def rename(self, old: str, new: str) -> None:
        self.files[new] = self.files.pop(old)

    def remove(self, path: str) -> None:
        del self.files[path]

    def sync_dir(self, path: str) -> None: ...

    def free_bytes(self) -> int:
        return 1 << 30

    def image(self) -> dict[str, bytes]:
        return {path: bytes(data) for path, data in self.files.items()}


def entries(first: int, count: int, term: int = 1) -> list[Entry]:
    return [Entry(first + i, term, b"%d of term %d" % (first + i, term)) for i in range(count)]


def flush(journal: Journal) -> None:
    job = journal.begin_flush()
    if job is not None:
        job.run()
        journal.flushed(job)


def open_journal(disk: MemoryDisk) -> Journal:
    return Journal.open(disk, segment_bytes=SEGMENT_BYTES)


def contents(journal: Journal) -> dict[tuple[str, int], tuple[object, ...]]:
    """Everything that a journal promises, to be compared."""
    found = {}
    for name in journal.groups():
        log = journal.group(*name)
        kept = log.slice(log.first_index, log.last_index, 1 << 30)
        found[name] = (log.first_index, log.base_term, log.term, log.vote, tuple(kept))
    return found


def three_flushes() -> tuple[MemoryDisk, list[dict[tuple[str, int], tuple[object, ...]]]]:
    disk = MemoryDisk()
    journal = open_journal(disk)
    promised = [contents(journal)]
    a, b = journal.group("meta", 1), journal.group("s00", 1)
    for turn in range(3):
        a.append(entries(1 + 3 * turn, 3, term=1 + turn))
        b.set_vote(turn + 1, "n1")
        b.append(entries(1 + turn, 1, term=2))
        if turn == 2:
            a.truncate_from(8)
            a.compact_to(4)
        flush(journal)
        promised.append(contents(journal))
    return disk, promised


def segment_files(disk: MemoryDisk) -> list[str]:
    return sorted(path for path in disk.files if path.endswith(".seg"))


@pytest.mark.parametrize("rolls", [False, True])
def test_a_write_torn_at_any_byte_is_cut_and_nothing_else(rolls: bool) -> None:
    disk, promised = three_flushes()
    if rolls:
        journal = open_journal(disk)
        while journal.stats().segments < 3:  # until the next block begins a segment
            journal.group("s00", 1).append(entries(journal.group("s00", 1).last_index + 1, 1, 2))
            flush(journal)
    before = disk.image()
    journal = open_journal(disk)
    known = contents(journal)
    journal.group("meta", 1).append(entries(8, 2, term=5))
    journal.group("s00", 1).set_vote(9, "n3")
    if rolls:
        log = journal.group("s00", 1)
        log.append([Entry(log.last_index + 1, 9, b"x" * (SEGMENT_BYTES // 2))])
    job = journal.begin_flush()
    assert job is not None
    new = contents(journal)
    offset, data = job.offset, job.data
    path = max(segment_files(disk), key=lambda p: bytes(disk.files[p]).count(data[:60]))
    assert (offset == 0) == rolls
    for size in range(len(data) + 1):
        torn = MemoryDisk(before)
        torn.open(path, create=True).allocate(SEGMENT_BYTES)
        torn.open(path).pwrite(data[:size], offset)
        # Zeros at its end need not be written to be there.
        whole = not data[size:].strip(b"\0")
        recovered = open_journal(torn)
        assert contents(recovered) == (new if whole else known), size
        # It can go on, and what it then writes is there after another restart.
        log = recovered.group("meta", 1)
        log.append(entries(log.last_index + 1, 2, term=6))
        flush(recovered)
        assert contents(open_journal(torn)) == contents(recovered)
    assert promised[-1] != new


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sectors_of_an_unsynced_write_may_be_missing_in_any_pattern(data: st.DataObject) -> None:
    disk, _ = three_flushes()
    before = disk.image()
    journal = open_journal(disk)
    known = contents(journal)
    journal.group("meta", 1).append([Entry(8 + i, 7, bytes([65 + i]) * 150) for i in range(30)])
    job = journal.begin_flush()
    assert job is not None
    new = contents(journal)
    torn = MemoryDisk(before)
    (path,) = [p for p in segment_files(disk) if job.data in bytes(disk.files[p])]
    file = torn.open(path, create=True)
    sectors = range(0, len(job.data), 512)
    written = data.draw(st.lists(st.booleans(), min_size=len(sectors), max_size=len(sectors)))
    for at, reached in zip(sectors, written, strict=True):
        if reached:
            file.pwrite(job.data[at : at + 512], job.offset + at)
    assert contents(open_journal(torn)) == (new if all(written) else known)


def used_bytes(disk: MemoryDisk) -> list[tuple[str, int]]:
    return [
        (path, at)
        for path in segment_files(disk)
        for at in range(len(bytes(disk.files[path]).rstrip(b"\0")))
    ]


def test_any_flipped_bit_in_what_was_synced_is_refused_by_file_and_offset() -> None:
    disk, _ = three_flushes()
    image = disk.image()
    chance = random.Random(1)
    for path, at in used_bytes(disk):
        damaged = MemoryDisk(image)
        damaged.files[path][at] ^= 1 << chance.randrange(8)
        with pytest.raises(JournalCorrupt) as refused:
            open_journal(damaged)
        assert refused.value.file == path
        assert refused.value.offset <= at < refused.value.offset + SEGMENT_BYTES
        assert path in refused.value.message
        assert refused.value.hint


def test_flips_are_proved_by_later_blocks_when_the_mark_is_lost() -> None:
    disk, _ = three_flushes()
    image = disk.image()
    del image["journal/synced"]
    last_block = bytes(disk.files[segment_files(disk)[-1]]).rfind(MAGIC)
    refused = cut = 0
    for path, at in used_bytes(disk):
        damaged = MemoryDisk(image)
        damaged.files[path][at] ^= 0x10
        try:
            open_journal(damaged)
            cut += 1
            assert at >= last_block, "only the last block has no later witness"
        except JournalCorrupt:
            refused += 1
    assert refused >= last_block
    assert cut


def test_damage_in_a_write_that_was_never_synced_is_cut() -> None:
    disk, promised = three_flushes()
    journal = open_journal(disk)
    journal.group("meta", 1).append(entries(8, 3, term=5))
    job = journal.begin_flush()  # and the process dies before the sync
    assert job is not None
    image = disk.image()
    for at in range(job.offset, job.offset + len(job.data), 3):
        damaged = MemoryDisk(image)
        damaged.files[segment_files(disk)[0]][at] ^= 0x40
        journal = open_journal(damaged)
        assert contents(journal) == promised[-1]
        assert journal.recovered.cut_reason or at < job.offset + HEADER_BYTES


def test_a_missing_segment_is_refused() -> None:
    disk = MemoryDisk()
    journal = open_journal(disk)
    log = journal.group("s00", 1)
    while journal.stats().segments < 6:
        log.append(entries(log.last_index + 1, 5))
        flush(journal)
    image = disk.image()
    for path in segment_files(disk)[:-1]:
        lost = MemoryDisk(image)
        del lost.files[path]
        with pytest.raises(JournalCorrupt):
            open_journal(lost)
    for path in segment_files(disk):
        del image[path]
    with pytest.raises(JournalCorrupt, match="no segment"):
        open_journal(MemoryDisk(image))


def test_a_newer_format_is_refused_by_name() -> None:
    disk, _ = three_flushes()
    image = disk.image()
    newer = bytearray(fmt.encode_block(1, 1, 0, 0, [], [], fmt.FLAG_SNAPSHOT)[0])
    newer[12] = fmt.VERSION + 1
    newer[fmt.HEADER_BODY.size : HEADER_BYTES] = fmt.CRC.pack(
        fmt.crc32(bytes(newer[: fmt.HEADER_BODY.size]))
    )
    damaged = MemoryDisk(image)
    damaged.files["journal/0000000000000001.seg"][: len(newer)] = newer
    with pytest.raises(JournalCorrupt, match="format 2"):
        open_journal(damaged)


def test_a_damaged_entry_that_is_read_back_is_refused() -> None:
    disk = MemoryDisk()
    journal = Journal.open(disk, segment_bytes=SEGMENT_BYTES, window_bytes=0)
    log = journal.group("s00", 1)
    log.append(entries(1, 3))
    flush(journal)
    data = disk.files[segment_files(disk)[0]]
    data[data.find(b"2 of term")] ^= 1
    with pytest.raises(JournalCorrupt):
        log.slice(1, 3, 1 << 20)


def test_the_old_blocks_of_a_recycled_segment_mean_nothing() -> None:
    disk = MemoryDisk()
    journal = open_journal(disk)
    log = journal.group("s00", 1)
    for _ in range(200):
        log.append(entries(log.last_index + 1, 4, term=3))
        flush(journal)
        log.compact_to(log.durable_index - 2)
        journal.reclaim()
        flush(journal)
        image = disk.image()
        assert contents(open_journal(MemoryDisk(image))) == contents(journal)
    assert journal.stats().segments <= 5
    assert max(len(data) for data in disk.files.values()) == SEGMENT_BYTES
