"""A shard's store alone: adds, reads, checkpoints and reopening, on one core, without an index."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
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


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _apply_each(shard: Shard, batches: list[list[Entry]]) -> tuple[float, float]:
    """(seconds in all, seconds of the longest call)."""
    times = [_timed(lambda: shard.apply(batch)) for batch in batches]  # noqa: B023
    return sum(times), max(times)


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
        seconds, longest = _apply_each(shard, [[entry] for entry in entries])
        rows += [
            Row("adds, 100 a command", count / seconds, "memories/s", 25_000),
            Row("longest of these applies", longest * 1e3, "ms", 50, lower_is_better=True),
            Row("file", shard.stats()["bytes"] / count, "bytes a memory"),
        ]
        rows += _checkpoint(shard)
        progress("reading")
        rows += _reads(shard, adds, dataset)
        shard.close()
        seconds = 0.0

        def reopen() -> None:
            nonlocal shard
            shard = Shard.open(path, "s00", dim=dataset.vectors.shape[1])

        progress("opening again")
        rows.append(Row("open again", _timed(reopen), "s", 0.3, lower_is_better=True))
        assert shard.count() == count
        shard.close()

        progress(f"adding {_SINGLES:,} memories, one a command")
        for together in (1, 16):
            single = Shard.open(Path(folder) / f"singles-{together}", "s01", dim=384)
            one = [_command(index, [add]) for index, add in enumerate(adds[:_SINGLES], 1)]
            batches = [one[at : at + together] for at in range(0, len(one), together)]
            seconds, _ = _apply_each(single, batches)
            name = f"adds, one a command, {together} commands an apply"
            rows.append(Row(name, len(one) / seconds, "memories/s"))
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
        Row("get", gets / _READS * 1e6, "us", 10, lower_is_better=True),
        Row("30 vectors", vectors / len(docs) * 1e6, "us"),
        Row("10 records", records / len(docs) * 1e6, "us"),
        Row("newest 100 of an owner of 1,000", listed / 20 * 1e6, "us"),
        Row("scan of everything", len(adds) / scanned, "memories/s"),
    ]


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    benchmark_main("The store of one shard", measure)
