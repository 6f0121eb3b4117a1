"""A part that is rid of the rest while it follows the whole's log is the one that was cut at its
end, row for row."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from agentmem_cluster.epochs.commands import Begin, Seal, encode
from agentmem_cluster.errors import DiskFull
from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Add, Delete, Op, Revive, Update
from tests.engine.commands import DIM, START_MS, an_entry, check_sums
from tests.engine.test_shard_split import PARTS, an_id, record

MEMORIES = 60
ENTRIES = 60


def a_vector(chance: random.Random) -> bytes | None:
    if chance.random() < 0.2:
        return None
    return np.full(DIM, chance.random(), dtype="<f4").tobytes()


def an_op(chance: random.Random, versions: dict[int, int]) -> Op:
    """Often what fits the memory as the writer remembers it, sometimes not."""
    number = chance.randrange(MEMORIES)
    read = versions.get(number, 0)
    if chance.random() < 0.1:
        read = chance.randrange(4)
    kind = chance.choice("auudr") if read else "a"
    key = an_id(number)
    versions[number] = versions.get(number, 0) + 1
    text = f"memory {number} {chance.random()}"
    if kind == "a":
        return Add(key, record(number, text), a_vector(chance), START_MS + number, None)
    if kind == "u":
        owner = number + (chance.random() < 0.1)  # another's: refused
        body = record(number, text, read + 1).replace(
            b"user%d" % (number % 4), b"user%d" % (owner % 4)
        )
        return Update(key, chance.choice([read, read, None]) or read, body, a_vector(chance), None)
    if kind == "d":
        return Delete(key, chance.choice([read, None]))
    return Revive(
        key, read, record(number, text, read + 1), a_vector(chance), START_MS + number, None
    )


def a_history(chance: random.Random) -> list[Entry]:
    versions: dict[int, int] = {}
    entries = []
    for index in range(1, ENTRIES):
        ops = [an_op(chance, versions) for _ in range(chance.randint(1, 5))]
        retried = chance.randint(1, index) if chance.random() < 0.1 else None
        entries.append(
            an_entry(
                index,
                *ops,
                request=None if retried is None else -retried,
                atomic=chance.random() < 0.2,
            )
        )
    return [*entries, Entry(ENTRIES, 1, encode(Seal(1)))]


def rows(shard: Shard) -> dict[str, list[tuple[bytes, bytes]]]:
    env = shard._store.env
    return {
        name: [(bytes(key), bytes(row)) for key, row in env.txn.cursor(db=db)]
        for name, db in env.db.items()
        if name != "meta"
    }


@pytest.mark.parametrize("seed", range(40))
def test_a_part_that_was_trimmed_ahead_is_the_one_that_was_cut_at_the_end(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    entries = a_history(chance)
    slots = PARTS[seed % 2]
    late = Shard.open(tmp_path / "late", "s00", dim=DIM)
    wanted = late.apply(entries)
    list(late.restrict(*slots))
    early = Shard.open(tmp_path / "early", "s00", dim=DIM)
    trimmed = chance.randrange(ENTRIES)
    early.apply(entries[:trimmed])
    list(early.trim(*slots))
    given = [result for entry in entries[trimmed:] for result in early.apply([entry])]
    list(early.restrict(*slots))
    assert [type(result) for result in given] == [type(result) for result in wanted[trimmed:]]
    assert early.digest() == late.digest()
    assert rows(early) == rows(late)
    assert early._store.state == late._store.state
    check_sums(early)
    assert any(rows(late)["docs"])
    # And they go on alike.
    own = [n for n in range(100, 110) if PARTS[n % 2] == slots]
    more = [
        Entry(ENTRIES + 1, 2, encode(Begin(2))),
        an_entry(
            ENTRIES + 2, *(Add(an_id(n), record(n, "new"), None, START_MS, None) for n in own)
        ),
    ]
    for shard in (early, late):
        shard.apply(more)
        assert all(shard.get("acme", an_id(n)) for n in own)
    assert early.digest() == late.digest()
    assert rows(early) == rows(late)


def test_no_entry_is_applied_to_a_copy_that_is_being_trimmed(tmp_path: Path) -> None:
    entries = a_history(random.Random(7))
    shard = Shard.open(tmp_path / "part", "s00", dim=DIM)
    shard.apply(entries[:30])
    steps = shard.trim(*PARTS[0])
    assert any(steps)  # up to the first that are gone
    steps.close()  # its task was cancelled: it goes on later
    with pytest.raises(ValueError, match="being trimmed"):
        shard.apply(entries[30:31])
    list(shard.trim(*PARTS[0]))
    shard.apply(entries[30:])


def test_a_full_disk_only_delays_a_trim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of owners were too high for ever when the room ended between two steps."""
    entries = a_history(random.Random(11))
    late = Shard.open(tmp_path / "late", "s00", dim=DIM)
    late.apply(entries)
    list(late.restrict(*PARTS[1]))
    part = Shard.open(tmp_path / "part", "s00", dim=DIM)
    part.apply(entries)
    env = part._store.env
    reserve, asked = env.reserve, 0

    def refuses_every_other(size_bytes: int) -> None:
        nonlocal asked
        asked += 1
        if asked % 2 == 0:
            raise DiskFull("no room", hint="make some")
        reserve(size_bytes)

    monkeypatch.setattr(env, "reserve", refuses_every_other)
    refused = 0
    while True:
        try:
            list(part.restrict(*PARTS[1]))
            break
        except DiskFull:
            refused += 1
    monkeypatch.undo()
    assert refused
    assert part.digest() == late.digest()
    assert rows(part) == rows(late)


def checkpointed(shard: Shard) -> bool:
    job = shard.checkpoint()
    if job is not None:
        job.run()
        shard.checkpoint_done(job)
    return job is not None


def test_pages_come_free_while_a_part_is_trimmed(tmp_path: Path) -> None:
    """No field of the state changes then, and without checkpoints the file grew to its double."""
    shard = Shard.open(tmp_path / "part", "s00", dim=DIM)
    for index in range(1, 61):
        numbers = range(100 * index, 100 * index + 100)
        adds = [Add(an_id(n), record(n, "tea " * 100), None, START_MS, None) for n in numbers]
        shard.apply([an_entry(index, *adds)])
        if index % 10 == 0:
            assert checkpointed(shard)
    before = shard.stats()["bytes"]
    made = sum(checkpointed(shard) for _ in shard.trim(*PARTS[0]))
    assert made >= 3
    assert shard.count() == 3_000
    assert shard.stats()["bytes"] < 1.3 * before
