"""A shard's store alone: adds, reads, checkpoints and reopening, on one core, without an index.

Rates and times are of the processor's time, so that a busy machine does not count; wall clock
stands beside them in the JSON. A checkpoint, which waits for the disk, is in wall clock.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Add, Write, encode_write
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import format_ms
from benchmarks.dataset import Dataset, make
from benchmarks.report import Row, benchmark_main

_START_MS = 1_790_000_000_000
_SINGLES = 5_000
_READS = 20_000
_BATCH = 100


def _adds(dataset: Dataset) -> list[Add]:
    adds = []
    for row, (text, owner) in enumerate(zip(dataset.texts, dataset.owners, strict=True)):
        at_ms = _START_MS + row // 10
        # Random within a millisecond, as ids are.
        chance = hashlib.blake2b(b"%d" % row, digest_size=7).digest()
        key = at_ms.to_bytes(6, "big") + b"\x80\x01\x80" + chance
        memory = Memory(
            id=format_id(key),
            content=text,
            user_id=owner,
            metadata={"city": "Oslo", "row": row},
            categories=["drinks"],
            created_at=format_ms(at_ms),
            updated_at=format_ms(at_ms),
            hash=chance.hex(),
        )
        vector = dataset.vectors[row].tobytes()
        adds.append(Add(key, msgspec.json.encode(memory), vector, at_ms, None))
    return adds


def _command(index: int, adds: list[Add]) -> Entry:
    request_id = hashlib.blake2b(b"%d" % index, digest_size=16).digest()
    write = Write(request_id, b"", "acme", adds[0].created_ms, tuple(adds))
    return Entry(index, 1, encode_write(write))


@dataclass(slots=True)
class Spent:
    cpu_s: float
    wall_s: float


def _timed(work: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def _per_second(name: str, count: int, spent: Spent, target: float | None = None) -> Row:
    detail = {"by_wall_clock": round(count / spent.wall_s)}
    return Row(name, count / spent.cpu_s, "memories/s", target, detail=detail)


def _each(name: str, count: int, spent: Spent, target: float | None = None) -> Row:
    detail = {"by_wall_clock": round(spent.wall_s / count * 1e6, 1)}
    return Row(name, spent.cpu_s / count * 1e6, "us", target, lower_is_better=True, detail=detail)


def _apply_each(shard: Shard, batches: list[list[Entry]]) -> tuple[Spent, float]:
    """What all took, and the processor seconds of the longest call."""
    times = [_timed(lambda: shard.apply(batch)) for batch in batches]  # noqa: B023
    whole = Spent(sum(t.cpu_s for t in times), sum(t.wall_s for t in times))
    return whole, max(t.cpu_s for t in times)


def measure(scale: float, progress: Callable[[str], None]) -> list[Row]:
    progress("making the memories")
    dataset = make(scale)
    adds = _adds(dataset)
    count = len(adds)
    rows = []
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as folder:
        path = Path(folder) / "s00"
        shard = Shard.open(path, "s00", dim=dataset.vectors.shape[1])
        parts = [adds[at : at + _BATCH] for at in range(0, count, _BATCH)]
        entries = [_command(index, part) for index, part in enumerate(parts, 1)]
        progress(f"adding {count:,} memories in commands of {_BATCH}")
        spent, longest = _apply_each(shard, [[entry] for entry in entries])
        rows += [
            _per_second("adds, 100 a command", count, spent, 25_000),
            Row("longest of these applies", longest * 1e3, "ms", 50, lower_is_better=True),
            Row(
                "file before its first checkpoint", shard.stats()["bytes"] / count, "bytes a memory"
            ),
        ]
        rows += _checkpoint(shard)
        progress("reading")
        rows += _reads(shard, adds, dataset)
        shard.close()

        def reopen() -> None:
            nonlocal shard
            shard = Shard.open(path, "s00", dim=dataset.vectors.shape[1])

        progress("opening again")
        opened = _timed(reopen).wall_s
        rows.append(Row("open again", opened, "s", 0.3, lower_is_better=True))
        assert shard.count() == count
        shard.close()

        progress(f"adding {_SINGLES:,} memories, one a command")
        for together in (1, 16):
            single = Shard.open(Path(folder) / f"singles-{together}", "s01", dim=384)
            one = [_command(index, [add]) for index, add in enumerate(adds[:_SINGLES], 1)]
            batches = [one[at : at + together] for at in range(0, len(one), together)]
            spent, _ = _apply_each(single, batches)
            name = f"adds, one a command, {together} commands an apply"
            rows.append(_per_second(name, len(one), spent))
            single.close()
    return rows


def _checkpoint(shard: Shard) -> list[Row]:
    begin = time.perf_counter()
    job = shard.checkpoint()
    begun = time.perf_counter()
    assert job is not None
    job.run()
    ran = time.perf_counter()
    shard.checkpoint_done(job)
    return [
        Row("checkpoint, on the loop", (begun - begin) * 1e3, "ms", 20, lower_is_better=True),
        Row("checkpoint, in its thread", (ran - begun) * 1e3, "ms"),
    ]


def _reads(shard: Shard, adds: list[Add], dataset: Dataset) -> list[Row]:
    rng = np.random.default_rng(1)
    keys = [adds[i].id for i in rng.integers(0, len(adds), _READS)]
    gets = _timed(lambda: [shard.get("acme", key) for key in keys])
    docs = rng.integers(1, len(adds) + 1, (200, 30))
    vectors = _timed(lambda: [shard.source.vectors(some) for some in docs])
    records = _timed(lambda: [shard.source.records(some[:10].tolist()) for some in docs])
    owner = f"user:{dataset.owners_of_size(1_000)[0]}"

    def lists() -> None:
        for _ in range(20):
            shard.list("acme", owner, accept=None, after=None, limit=100, now_ms=0)

    listed = _timed(lists)
    scanned = _timed(lambda: sum(1 for _ in shard.source.scan("acme", None)))
    return [
        _each("get", _READS, gets, 10),
        _each("30 vectors", len(docs), vectors),
        _each("10 records", len(docs), records),
        _each("newest 100 of an owner of 1,000", 20, listed),
        _per_second("scan of everything", len(adds), scanned),
    ]


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    benchmark_main("The store of one shard", measure)
