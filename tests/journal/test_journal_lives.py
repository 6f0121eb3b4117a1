"""Whole lives of a journal: random operations, full disks, kills and power losses, over and over.

The rule is one: after a crash the journal holds what was synced last, or one of the states whose
write was under way, and nothing between or beyond.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_chaos.sim.disk import SimDisk
from agentmem_cluster.journal.group import GroupLog
from agentmem_cluster.journal.journal import Journal, JournalCorrupt
from agentmem_cluster.raft.api import Entry

SEGMENT_BYTES = 2048

Contents = dict[tuple[str, int], tuple[object, ...]]

COMMON = ["append", "flush", "reclaim"]
RARE = ["truncate", "compact", "vote", "drop", "full", "room"]
CRASHES = ["kill", "kill after the sync", "power loss"]


def contents(journal: Journal) -> Contents:
    """Everything that a journal promises, to be compared."""
    found: Contents = {}
    for name in journal.groups():
        log = journal.group(*name)
        kept = log.slice(log.first_index, log.last_index, 1 << 30)
        found[name] = (log.first_index, log.base_term, log.term, log.vote, tuple(kept))
    return found


class Life:
    def __init__(self, seed: int) -> None:
        self.disk = SimDisk(random.Random(seed))
        self.term = 1
        self.journal = Journal.open(self.disk, segment_bytes=SEGMENT_BYTES, window_bytes=2000)
        self.synced = contents(self.journal)
        self.under_way: list[Contents] = []

    def do(self, what: str, which: int, number: int) -> None:
        log = self.journal.group(f"s0{which}", 1)
        if what == "flush":
            if self._write():
                self.synced, self.under_way = self.under_way[-1], []
        elif what in CRASHES:
            self._crash(what)
        elif what == "reclaim":
            self.journal.reclaim()
        elif what in ("full", "room"):
            self.disk.full = what == "full"
        elif what == "drop":
            if number % 10 == 0:
                self.journal.drop_group(log.id, 1)
        else:
            self._change(log, what, number)

    def _change(self, log: GroupLog, what: str, number: int) -> None:
        if what == "append":
            for i in range(1 + number % 5):
                command = b"%d " % number * ((number + 7 * i) % 30)
                log.append([Entry(log.last_index + 1, self.term, command)])
        elif what == "truncate" and log.last_index > log.first_index:
            log.truncate_from(log.last_index - number % (log.last_index - log.first_index))
            self.term += 1
        elif what == "compact" and log.durable_index >= log.first_index:
            kept = log.durable_index - log.first_index + 1
            log.compact_to(log.first_index + number % kept)
        elif what == "vote":
            log.set_vote(log.term + 1, f"n{number}")

    def _write(self) -> bool:
        self.under_way.append(contents(self.journal))
        try:
            job = self.journal.begin_flush()
        except OSError:
            return False
        if job is not None:
            job.run()
            self.journal.flushed(job)
        return True

    def _crash(self, what: str) -> None:
        self.under_way.append(contents(self.journal))
        try:
            job = self.journal.begin_flush()
        except OSError:
            job = None
        if job is not None and what == "kill after the sync":
            job.run()
            self.synced, self.under_way = self.under_way[-1], []
        if what == "power loss":
            self.disk.power_loss()
        else:
            self.disk.kill()
        self.disk.full = False
        self.journal = Journal.open(self.disk, segment_bytes=SEGMENT_BYTES, window_bytes=2000)
        found = contents(self.journal)
        assert found == self.synced or found in self.under_way
        self.synced, self.under_way = found, []  # recovery syncs what it read

    def check(self) -> None:
        for name in self.journal.groups():
            log = self.journal.group(*name)
            kept = log.slice(log.first_index, log.last_index, 1 << 30)
            assert [e.index for e in kept] == list(range(log.first_index, log.last_index + 1))
            assert [log.term_at(e.index) for e in kept] == [e.term for e in kept]
            assert all(log.command_at(e.index) == e for e in kept)


STEP = st.tuples(
    st.sampled_from(COMMON * 4 + RARE + CRASHES), st.integers(0, 2), st.integers(0, 1000)
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=1, max_size=60), st.integers(0, 1 << 30))
def test_whatever_happens_what_was_synced_is_there_after_a_crash(
    steps: list[tuple[str, int, int]], seed: int
) -> None:
    life = Life(seed)
    for what, which, number in steps:
        life.do(what, which, number)
    life.check()


@pytest.mark.parametrize("seed", range(40))
def test_long_lives_fill_and_free_segments_and_lose_nothing(seed: int) -> None:
    chance = random.Random(seed)
    life = Life(seed)
    crashes = chance.choice([0.0, 0.02, 0.1])
    for _ in range(300):
        kinds = CRASHES if chance.random() < crashes else COMMON * 4 + RARE
        # One group is busy and the others mostly idle, so that old entries must be moved.
        life.do(chance.choice(kinds), chance.choice([0, 0, 0, 1, 2]), chance.randrange(1000))
    life.check()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_anywhere_is_refused_or_harmless(seed: int) -> None:
    """Recycled, relocated and cut: whatever stands in the files, wrong entries are never served."""
    chance = random.Random(seed)
    life = Life(seed)
    for _ in range(150):
        kind = chance.choice(CRASHES if chance.random() < 0.03 else COMMON * 4 + RARE)
        life.do(kind, chance.choice([0, 0, 0, 1]), chance.randrange(1000))
    life.do("room", 0, 0)
    life.do("flush", 0, 0)
    disk = life.disk
    images = {name: disk.open(f"journal/{name}").pread(1 << 20, 0) for name in disk.list("journal")}
    refused = 0
    for _ in range(60):
        name = chance.choice(sorted(name for name, data in images.items() if data))
        at = chance.randrange(len(images[name]))
        disk.open(f"journal/{name}").pwrite(
            bytes([images[name][at] ^ 1 << chance.randrange(8)]), at
        )
        try:
            found = contents(Journal.open(disk, segment_bytes=SEGMENT_BYTES))
            assert found == life.synced
        except JournalCorrupt as damage:
            refused += 1
            assert damage.file.startswith("journal/")
        for kept in disk.list("journal"):
            if kept not in images:
                disk.remove(f"journal/{kept}")
        for kept, data in images.items():
            file = disk.open(f"journal/{kept}", create=True)
            file.truncate(len(data))
            file.pwrite(data, 0)
    assert refused
