"""Backups of a cluster of three nodes: how fast, how much is uploaded again, how long writes wait.

    python -m benchmarks.backup [--scale 0.1] [--json FILE]

40,000 memories with vectors of 384 values at scale 1. Speed is the size of all shards' files
(one replica of each) divided by the time of the whole command. The pause is the latency of a
writer's calls while backups are made one after the other, beside the same without any.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agentmem_client as client
from agentmem_node.cli.asking import OneNode
from agentmem_node.cli.devcluster import DevCluster
from benchmarks.report import Row, benchmark_main

_MEMORIES = 40_000
_DIM = 384
_OWNERS = 50
_CHANGED_SHARE = 0.01
_WRITE_S = 8.0
_SETTINGS = {"embedding.provider": "none", "embedding.dim": _DIM, "cluster.shards": 4}
_POLL_S = 0.02


def follow(node: OneNode, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """(result, seconds) of a backup or a restore."""
    begun_s = time.perf_counter()
    work = node.ask("POST", path, body)
    while work["state"] == "running":
        time.sleep(_POLL_S)
        work = node.ask("GET", f"/backups/{work['id']}")
    if work["state"] != "done":
        raise RuntimeError(f"{path}: {work['error']}")
    return work["result"], time.perf_counter() - begun_s


def memories(first: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    words = ["tea", "rain", "Oslo", "music", "red", "walk", "bread", "window", "Tuesday", "cat"]
    return [
        {
            "content": f"{number}: " + " ".join(chance.choices(words, k=24)),
            "user_id": f"user-{number % _OWNERS}",
            "vector": [chance.uniform(-1, 1) for _ in range(_DIM)],
        }
        for number in range(first, first + count)
    ]


def latencies_ms(urls: list[str], stop: threading.Event) -> list[float]:
    """Of single adds, one after the other, until `stop` is set."""
    taken = []
    with client.Client(urls) as memory:
        number = 0
        while not stop.is_set():
            begun_s = time.perf_counter()
            memory.add("a small note", user_id=f"writer-{number % _OWNERS}")
            taken.append((time.perf_counter() - begun_s) * 1000)
            number += 1
    return sorted(taken)


def measure_writes(urls: list[str], node: OneNode, url: str | None) -> tuple[list[float], int]:
    """(latencies, backups made meanwhile)."""
    stop = threading.Event()
    found: list[list[float]] = []
    writer = threading.Thread(target=lambda: found.append(latencies_ms(urls, stop)))
    writer.start()
    made = 0
    until_s = time.perf_counter() + _WRITE_S
    try:
        while time.perf_counter() < until_s:
            if url is None:
                time.sleep(_POLL_S)
            else:
                follow(node, "/backups", {"url": url})
                made += 1
    finally:
        stop.set()
        writer.join()
    return found[0], made


def at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def measure(scale: float, say: Callable[[str], None]) -> list[Row]:
    count = max(1_000, int(_MEMORIES * scale))
    folder = Path(tempfile.mkdtemp(prefix="agentmem-backup-"))
    store = str(folder / "store")
    chance = random.Random(1)
    rows: list[Row] = []
    try:
        with DevCluster(folder / "cluster", settings=_SETTINGS) as cluster:
            node = OneNode(cluster.urls[0], None, None)
            say(f"storing {count:,} memories")
            with client.Client(cluster.urls) as memory:
                memory.add_many(memories(0, count, chance), batch_size=200)
            say("backing up")
            first, first_s = follow(node, "/backups", {"url": store})
            size_mb = first["size_bytes"] / 1e6
            with client.Client(cluster.urls) as memory:
                changed = int(count * _CHANGED_SHARE)
                memory.add_many(memories(count, changed, chance), batch_size=200)
            second, second_s = follow(node, "/backups", {"url": store})
            ratio = second["uploaded_bytes"] / first["uploaded_bytes"]
            rows += [
                Row("backup, all of it", size_mb / first_s, "MB/s", detail={"mb": size_mb}),
                Row("uploaded of it (compressed)", first["uploaded_bytes"] / 1e6, "MB"),
                Row("next backup, 1 % added", second_s, "s"),
                Row("uploaded again", 100 * ratio, "%", lower_is_better=True),
                Row("writes held up by its moment", second["writes_waited_ms"], "ms"),
            ]
            say("writing, without backups and with")
            alone, _ = measure_writes(cluster.urls, node, None)
            during, made = measure_writes(cluster.urls, node, store)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                rows.append(Row(f"add {name}, no backup", at(alone, share), "ms"))
                rows.append(Row(f"add {name}, {made} backups", at(during, share), "ms"))
        with DevCluster(folder / "new", nodes=1, settings=_SETTINGS) as new:
            node = OneNode(new.urls[0], None, None)
            say("restoring")
            body = {"url": store, "everything": True, "backup": first["backup"]}
            restored, restored_s = follow(node, "/backups/restore", body)
            if restored["added"] != count or restored["content"] != first["content"]:
                raise RuntimeError(f"restored {restored}")
            rows.append(Row("restore through writes", count / restored_s, "memories/s"))
            rows.append(Row("the same", size_mb / restored_s, "MB/s"))
            # Nothing is left to do: fetching, checking and comparing alone.
            _, again_s = follow(node, "/backups/restore", body)
            rows.append(Row("restore with nothing to do", size_mb / again_s, "MB/s"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


if __name__ == "__main__":
    benchmark_main("Backups", measure)
