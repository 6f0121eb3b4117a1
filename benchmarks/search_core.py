"""Searching within one shard, without HTTP or Raft: what a search costs in processor time.

    python -m benchmarks.search_core [--scale 0.1] [--json FILE]

Over the real store (LMDB), one thread. Processor time, not wall time, so that other load on the
machine counts less. Recall is that of vector searches against brute force in float32.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.model.commands import Add, Write, encode_write
from agentmem_node.model.filters import Compare
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.search import SearchQuery
from agentmem_node.model.times import format_ms
from benchmarks.dataset import Dataset, exact_top, make, query_vector
from benchmarks.load import median
from benchmarks.report import Row, benchmark_main

_NOW_MS = 1_750_000_000_000
_BATCH = 100
_TENANT = "bench"
_TARGETS_US = {1_000: 100.0, 10_000: 400.0}
_QUERIES = 64


def load(shard: Shard, data: Dataset, *, run_length: int) -> None:
    """Store the data; with `run_length`, so many successive memories of an owner share a run."""
    encoder = msgspec.json.Encoder()
    of_owner: dict[str, int] = {}
    index = shard.applied_index
    for start in range(0, len(data.texts), _BATCH):
        ops = []
        for row in range(start, min(start + _BATCH, len(data.texts))):
            owner = data.owners[row]
            of_owner[owner] = of_owner.get(owner, 0) + 1
            memory = Memory(
                id=format_id(row.to_bytes(16, "big")),
                content=data.texts[row],
                user_id=owner,
                run_id=f"run{of_owner[owner] // run_length}" if run_length else None,
                created_at=format_ms(_NOW_MS),
                updated_at=format_ms(_NOW_MS),
            )
            ops.append(
                Add(
                    row.to_bytes(16, "big"),
                    encoder.encode(memory),
                    data.vectors[row].tobytes(),
                    _NOW_MS,
                    None,
                )
            )
        index += 1
        write = Write(index.to_bytes(16, "big"), b"", _TENANT, _NOW_MS, tuple(ops))
        shard.apply([Entry(index, 1, encode_write(write))])


def processor_us(call: Callable[[int], object], repeats: int = 7) -> float:
    """The median of `repeats` rounds over all queries, in microseconds of processor time each."""
    for number in range(_QUERIES):
        call(number)
    rounds = []
    for _ in range(repeats):
        begun = time.process_time()
        for number in range(_QUERIES):
            call(number)
        rounds.append((time.process_time() - begun) / _QUERIES * 1e6)
    return median(rounds)


def queries_of(data: Dataset, size: int) -> list[tuple[str, SearchQuery]]:
    owners = data.owners_of_size(size)
    rng = np.random.default_rng(17)
    made = []
    for number in range(_QUERIES):
        owner = owners[number % len(owners)]
        row = int(rng.choice(data.rows_of[owner]))
        words = data.texts[row].split()
        text = " ".join(words[i] for i in sorted(rng.choice(len(words), 5, replace=False)))
        vector = query_vector(data, row, number).astype("<f4").tobytes()
        query = SearchQuery(_TENANT, Scope(user_id=owner), 10, _NOW_MS + 1, text, vector)
        made.append((owner, query))
    return made


def search_us(index: ShardIndex, asked: list[tuple[str, SearchQuery]], **changes: Any) -> float:
    changed = [dataclasses.replace(query, **changes) for _, query in asked]
    return processor_us(lambda number: index.search_local(changed[number]))


def recall_at_10(index: ShardIndex, data: Dataset, asked: list[tuple[str, SearchQuery]]) -> float:
    found = 0
    for owner, query in asked:
        vector = np.frombuffer(query.vector or b"", "<f4")
        hits = index.search_local(dataclasses.replace(query, text=None)).hits
        best = exact_top(data, owner, vector, 10)
        found += len({int.from_bytes(hit.id, "big") for hit in hits} & set(best))
    return found / (10 * len(asked))


def measure_data(
    data: Dataset, progress: Callable[[str], None], label: str, run_length: int
) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="agentmem-bench-") as folder:
        shard = Shard.open(
            Path(folder) / "shard", "s00", dim=384, index_factory=lambda source: ShardIndex(source)
        )
        progress(f"loading {len(data.texts):,} memories{label}")
        load(shard, data, run_length=run_length)
        index = shard.index
        for size in (100, 1_000, 10_000):
            asked = queries_of(data, size)
            progress(f"owners of {size:,}{label}")

            target = None if run_length else _TARGETS_US.get(size)
            cost = search_us(index, asked)
            name = f"owner of {size:,}{label}"
            rows.append(Row(f"hybrid, {name}", cost, "us", target, lower_is_better=True))
            if run_length:
                continue
            some = Compare("importance", "gte", 0.2)
            rows += [
                Row(f"vector, {name}", search_us(index, asked, text=None), "us"),
                Row(f"bm25, {name}", search_us(index, asked, vector=None), "us"),
                Row(f"hybrid with a filter, {name}", search_us(index, asked, filter=some), "us"),
                Row(f"hybrid by rrf, {name}", search_us(index, asked, fusion="rrf"), "us"),
                Row(f"recall@10, {name}", recall_at_10(index, data, asked), "", 0.99),
            ]
        if not run_length:
            rows += resident(shard, data, progress)
        shard.close()
    return rows


def resident(shard: Shard, data: Dataset, progress: Callable[[str], None]) -> list[Row]:
    """Memory that the blocks of all owners take, and what it takes to build a large one."""
    progress("searching every owner")
    largest = data.owners_of_size(10_000)[0]
    gc.collect()
    tracemalloc.start()
    index = ShardIndex(shard.source)
    for owner in data.rows_of:
        index.search_local(
            SearchQuery(_TENANT, Scope(user_id=owner), 1, _NOW_MS + 1, text=data.texts[0])
        )
    gc.collect()
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    steps = []
    query = SearchQuery(_TENANT, Scope(user_id=largest), 1, _NOW_MS + 1, text=data.texts[0])
    fresh = ShardIndex(shard.source)
    begun_cpu, begun = time.process_time(), time.perf_counter()
    for _ in fresh.build_steps(query):
        steps.append((time.perf_counter() - begun) * 1e3)
        begun = time.perf_counter()
    build_s = time.process_time() - begun_cpu
    size = len(data.texts)
    return [
        Row("memory per vector, all blocks", allocated / size, "B", 900, lower_is_better=True),
        Row("building the block of an owner of 10,000", build_s * 1e3, "ms"),
        Row("longest step of building it (wall time)", max(steps), "ms"),
    ]


def measure(scale: float, progress: Callable[[str], None]) -> list[Row]:
    data = make(scale)
    rows = measure_data(data, progress, "", run_length=0)
    return rows + measure_data(data, progress, ", in runs of 20", run_length=20)


if __name__ == "__main__":
    benchmark_main("Search within one shard", measure)
