"""Memory of one node at 100,000 memories, and how long it takes to start again.

    python -m benchmarks.footprint [--scale 0.1] [--json FILE]

Bytes for each vector are what the process grew by, anonymous memory only, after the memories were
added *and* every owner was searched (so that every index is in memory), divided by their number.
Start: from exec to the first search answered, after a clean stop and after kill -9.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import servers
from benchmarks.dataset import Dataset, floats, make
from benchmarks.load import median
from benchmarks.report import Row, benchmark_main
from benchmarks.vs_chroma import load_agentmem

_STARTS = 3


def search_every_owner(url: str, data: Dataset) -> None:
    for owner, rows in data.rows_of.items():
        vector = floats(data.vectors[rows[0]])
        found = servers.request(
            "POST",
            url + "/api/v1/memories/search",
            {"vector": vector, "query": data.texts[rows[0]], "user_id": owner, "top_k": 1},
        )
        if not found["results"]:
            raise RuntimeError(f"nothing found for {owner}")


def first_answer_s(directory: Path, port: int, data: Dataset, *, kill: bool) -> float:
    """Seconds from exec to the first search answered. The process is then stopped, or killed."""
    begun = time.perf_counter()
    process = servers.start_node(directory, port, AGENTMEM_EMBEDDING_PROVIDER="none")
    url = f"http://127.0.0.1:{port}"
    try:
        servers.wait_ready(url + "/health/ready", process)
        servers.request(
            "POST",
            url + "/api/v1/memories/search",
            {"query": data.texts[0], "user_id": data.owners[0], "top_k": 1},
        )
        return time.perf_counter() - begun
    finally:
        if kill:
            process.kill()
            process.wait()
        else:
            servers.stop(process)


def measure_all(scale: float, progress: Callable[[str], None]) -> list[Row]:
    data = make(scale)
    count = len(data.texts)
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    try:
        with servers.agentmem_node(keep=directory) as node:
            pid, port = node.processes[0].pid, node.ports[0]
            _, before = servers.resident_bytes(pid)
            progress(f"adding {count:,} memories")
            loaded = asyncio.run(load_agentmem(port, data))
            if loaded.errors:
                raise RuntimeError(loaded.first_error)
            progress("searching every owner")
            search_every_owner(node.url(), data)
            total, after = servers.resident_bytes(pid)
        progress("starting again")
        # The last start of each kind decides how the next one finds the disk.
        clean = [first_answer_s(directory, port, data, kill=False) for _ in range(_STARTS)]
        first_answer_s(directory, port, data, kill=True)
        killed = [first_answer_s(directory, port, data, kill=True) for _ in range(_STARTS)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return [
        Row(
            f"resident bytes a vector at {count:,}",
            (after - before) / count,
            "B",
            target=900,
            lower_is_better=True,
            detail={"before": before, "after": after, "resident_with_page_cache": total},
        ),
        Row(
            f"start with {count:,} memories to the first answer, after a clean stop",
            median(clean),
            "s",
            target=3,
            lower_is_better=True,
            detail={"all": clean},
        ),
        Row(
            "... after kill -9",
            median(killed),
            "s",
            target=3,
            lower_is_better=True,
            detail={"all": killed},
        ),
    ]


if __name__ == "__main__":
    benchmark_main("Footprint and start of one node", measure_all)
