"""How long writes stop when a leader is killed: kill -9 to the next acknowledged write, 20 times.

    python -m benchmarks.failover [--scale 1] [--json FILE]

Three nodes on this machine. Each round kills the leader of a shard with SIGKILL, and asks the two
survivors in turn to store a memory of that shard, every few milliseconds, until one is
acknowledged. The killed node is then started again, and the next round waits until every shard
has three replicas that caught up. At the end every acknowledged memory is read back.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem_cluster.ring import slot_of
from agentmem_node.cli.devcluster import DevCluster
from benchmarks.load import median
from benchmarks.report import Row, benchmark_main

_KILLS = 20
_ROUND_S_MAX = 30.0
_ATTEMPT_S = 1.5


def ask(method: str, url: str, document: object = None, timeout: float = 10.0) -> Any:
    data = None if document is None else json.dumps(document).encode()
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(url, data=data, method=method, headers=headers)
    with urllib.request.urlopen(call, timeout=timeout) as answer:
        return json.loads(answer.read())


def leader_of(view: dict[str, Any], owner: str) -> str | None:
    slot = slot_of("default", f"user:{owner}")
    for shard in view["shards"].values():
        if any(first <= slot <= last for first, last in shard["slots"]):
            leader: str | None = shard["leader"]
            return leader
    return None


def caught_up(urls: list[str]) -> bool:
    """Every node is ready: its groups have leaders and it has applied what they committed."""
    try:
        return all(ask("GET", f"{url}/health/ready", timeout=2.0) for url in urls)
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _ROUND_S_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} took more than {_ROUND_S_MAX:.0f} s")
        time.sleep(0.05)


def measure_all(scale: float, progress: Callable[[str], None]) -> list[Row]:
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    gaps_s: list[float] = []
    acknowledged: list[str] = []
    kills = max(1, int(_KILLS * scale))
    settings = {"embedding.provider": "none"}
    try:
        with DevCluster(directory, nodes=3, settings=settings) as cluster:
            urls = {node.id: node.url for node in cluster.nodes}
            for number in range(kills):
                owner = f"owner-{number}"
                wait_for(lambda: caught_up(cluster.urls), "catching up")
                victim = leader_of(ask("GET", f"{cluster.urls[0]}/api/v1/cluster"), owner)
                if victim is None:
                    raise RuntimeError(f"the shard of {owner} has no leader")
                acknowledged.append(add(urls[victim], owner, f"before kill {number}"))
                progress(f"kill {number + 1} of {kills}: {victim}")
                survivors = itertools.cycle([u for node, u in urls.items() if node != victim])
                cluster.kill(int(victim[1:]))
                begun = time.perf_counter()
                while True:
                    try:
                        acknowledged.append(add(next(survivors), owner, f"after kill {number}"))
                        break
                    except OSError:
                        if time.perf_counter() - begun > _ROUND_S_MAX:
                            raise RuntimeError("no write was acknowledged again") from None
                        time.sleep(0.005)
                gaps_s.append(time.perf_counter() - begun)
                cluster.restart(int(victim[1:]))
            wait_for(lambda: caught_up(cluster.urls), "catching up")
            lost = [i for i in acknowledged if not exists(cluster.urls[0], i)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    ordered = sorted(gaps_s)
    return [
        Row(
            f"kill -9 of a leader to the next acknowledged write, {kills} kills: median",
            median(gaps_s),
            "s",
            detail={"all": [round(g, 3) for g in gaps_s]},
        ),
        Row(
            "... p99",
            ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
            "s",
            target=1.5,
            lower_is_better=True,
        ),
        Row(
            "acknowledged memories lost",
            len(lost),
            "",
            target=0,
            lower_is_better=True,
            detail={"acknowledged": len(acknowledged), "lost": lost},
        ),
    ]


def add(url: str, owner: str, text: str) -> str:
    answer = ask(
        "POST", f"{url}/api/v1/memories", {"content": text, "user_id": owner}, timeout=_ATTEMPT_S
    )
    memory_id: str = answer["results"][0]["id"]
    return memory_id


def exists(url: str, memory_id: str) -> bool:
    try:
        ask("GET", f"{url}/api/v1/memories/{memory_id}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


if __name__ == "__main__":
    benchmark_main("Fail-over", measure_all)
