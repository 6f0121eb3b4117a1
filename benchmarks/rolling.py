"""What clients notice of a restart and of a stopped node: failed requests, and how long they wait.

    python -m benchmarks.rolling [--scale 1] [--json FILE]

Three nodes on this machine and one client of this project, which stores, reads, lists and searches
at a constant rate. Requests begin at their time whether or not earlier ones were answered, and the
latency counts from that time, so a pause is charged to everybody who would have met it.

1. Every node is stopped by SIGTERM, started again and waited for, one after the other.
2. A node is stopped by SIGSTOP for a few seconds, and goes on: first under reads that any replica
   may answer, then under the mix, where a shard that it led needs another leader first.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmem_client import AgentMemError, AsyncClient, Policy, calls
from agentmem_node.cli.devcluster import DevCluster, is_ready
from benchmarks.report import Row, benchmark_main

SETTINGS = {"embedding.provider": "none", "embedding.dim": 0, "cluster.shards": 8}
_OWNERS = 40
_RATE_PER_S = 80
_STOPPED_S = 6.0
_READY_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Sample:
    kind: str
    begun_s: float  # on the clock of the run
    took_s: float
    error: str = ""


@dataclass(slots=True)
class Load:
    """Requests at a constant rate, and what became of them."""

    client: AsyncClient
    kinds: Sequence[str]  # drawn from, evenly
    rate_per_s: float = _RATE_PER_S
    consistency: str = "linearizable"
    samples: list[Sample] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)  # memory id to text, acknowledged
    _random: random.Random = field(default_factory=lambda: random.Random(7))
    _number: int = 0

    async def fill(self) -> None:
        """Something to read for every owner."""
        await asyncio.gather(*(self.add(f"owner-{n}") for n in range(_OWNERS) for _ in range(2)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests while the block runs; those under way at its end are waited for."""
        begun = time.perf_counter()
        under_way: set[asyncio.Task[None]] = set()
        stop = asyncio.Event()

        async def send_all() -> None:
            number = 0
            while not stop.is_set():
                due = begun + number / self.rate_per_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                task = asyncio.create_task(self._one(due, begun))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                number += 1

        sender = asyncio.create_task(send_all())
        try:
            yield
        finally:
            stop.set()
            await sender
            if under_way:
                await asyncio.wait(under_way, timeout=60.0)

    async def _one(self, due: float, begun: float) -> None:
        kind = self._random.choice(self.kinds)
        error = ""
        try:
            await self._ask(kind, f"owner-{self._random.randrange(_OWNERS)}")
        except AgentMemError as failed:
            error = f"{kind}: {type(failed).__name__}: {failed.message}"
        self.samples.append(Sample(kind, due - begun, time.perf_counter() - due, error))

    async def _ask(self, kind: str, owner: str) -> None:
        memory: Any = self.client
        if kind == "add":
            await self.add(owner)
        elif kind == "get":
            wanted = self._random.choice(list(self.stored))
            await memory.get(wanted, consistency=self.consistency)
        elif kind == "list":
            await memory.list_page(user_id=owner, limit=10, consistency=self.consistency)
        else:
            await memory.search("parcel", user_id=owner, top_k=5, consistency=self.consistency)

    async def add(self, owner: str) -> None:
        self._number += 1
        text = f"parcel {self._number} of {owner}"
        added = await self.client.add(text, user_id=owner)
        self.stored[added.memories[0].id] = text

    async def lost(self) -> list[str]:
        """Ids of acknowledged memories that are not there, or not what was stored."""
        missing = []
        for memory_id, text in list(self.stored.items()):
            try:
                if (await self.client.get(memory_id)).content != text:
                    missing.append(memory_id)
            except AgentMemError:
                missing.append(memory_id)
        return missing


def quantile(samples: Sequence[Sample], share: float) -> float:
    """Seconds; of the requests that failed too."""
    took = sorted(sample.took_s for sample in samples)
    return took[min(len(took) - 1, int(len(took) * share))] if took else math.nan


def failures(samples: Sequence[Sample]) -> list[str]:
    return [sample.error for sample in samples if sample.error]


MIX = ("add", "add", "get", "list", "search")
READS = ("get", "list", "search")


async def all_ready(cluster: DevCluster) -> None:
    """Every node is ready. Raises TimeoutError."""
    async with asyncio.timeout(_READY_S_MAX):
        for node in cluster.nodes:
            while not await asyncio.to_thread(is_ready, node):
                await asyncio.sleep(0.05)


async def rolling_restart(
    cluster: DevCluster, *, settle_s: float = 1.0, rounds: int = 1
) -> tuple[Load, list[str]]:
    """(what the load met, ids of lost memories): every node restarted by SIGTERM, in turn."""
    async with AsyncClient(cluster.urls) as client:
        load = Load(client, MIX)
        await load.fill()
        async with load.running():
            await asyncio.sleep(settle_s)
            for _ in range(rounds):
                for number in range(1, len(cluster.nodes) + 1):
                    code = await asyncio.to_thread(cluster.terminate, number)
                    if code != 0:
                        raise RuntimeError(f"node {number} ended with {code}")
                    await asyncio.to_thread(cluster.restart, number)
                    await all_ready(cluster)
                    await asyncio.sleep(settle_s)
        return load, await load.lost()


def longest_hedge_delay(client: AsyncClient, kinds: Sequence[str]) -> float:
    """Seconds that the client would wait now before it asks a second node."""
    made: dict[str, calls.Call[Any]] = {
        "add": calls.add("x", None, {"user_id": "x"}),
        "get": calls.get("x", {}),
        "list": calls.list_page({"user_id": "x"}),
        "search": calls.search("x", {"user_id": "x"}),
    }
    return max(client._router.hedge_after(made[kind]) for kind in kinds)


async def leader_of_most(client: AsyncClient) -> str:
    """The node that leads the shards of the most owners: its stop is met by the most requests."""
    topology = await client.cluster()
    shards = [topology.shard_of_owner(f"user:owner-{number}") for number in range(_OWNERS)]
    leaders = Counter(shard.leader for shard in shards if shard is not None and shard.leader)
    return leaders.most_common(1)[0][0]


@dataclass(slots=True)
class Stop:
    """What a load met before, while and after a node stood still."""

    before: list[Sample]
    during: list[Sample]
    hedge_s: float  # the delay that held when the node was stopped, the longest of all kinds
    lost: list[str]


async def stopped_node(
    cluster: DevCluster,
    kinds: Sequence[str],
    *,
    consistency: str = "linearizable",
    stopped_s: float = _STOPPED_S,
    policy: Policy | None = None,
) -> Stop:
    """A node that leads some shards is stopped by SIGSTOP under load, and goes on."""
    await all_ready(cluster)
    async with AsyncClient(cluster.urls, policy=policy) as client:
        load = Load(client, kinds, consistency=consistency)
        await load.fill()
        begun = time.perf_counter()
        async with load.running():
            await asyncio.sleep(3.0)
            victim = await leader_of_most(client)
            hedge_s = longest_hedge_delay(client, kinds)
            stopped_at = time.perf_counter() - begun
            cluster.pause(victim)
            try:
                await asyncio.sleep(stopped_s)
            finally:
                cluster.resume(victim)
            await asyncio.sleep(1.0)
        samples = load.samples
        await all_ready(cluster)
        lost = await load.lost()
    return Stop(
        # One that was under way when the node was stopped has met it.
        [s for s in samples if s.begun_s + s.took_s < stopped_at],
        [s for s in samples if s.begun_s + s.took_s >= stopped_at],
        hedge_s,
        lost,
    )


def measure_all(scale: float, progress: Callable[[str], None]) -> list[Row]:
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    rounds = max(1, round(3 * scale))

    async def all_of(cluster: DevCluster) -> list[Row]:
        progress(f"{rounds} rolling restarts of three nodes")
        load, lost = await rolling_restart(cluster, rounds=rounds)
        rows = _restart_rows(load, lost, rounds)
        progress("a node stopped by SIGSTOP, under reads of any replica")
        rows += _stop_rows(
            "eventual reads", await stopped_node(cluster, READS, consistency="eventual")
        )
        progress("a node stopped by SIGSTOP, under the mix")
        return rows + _stop_rows("the mix", await stopped_node(cluster, MIX))

    try:
        with DevCluster(directory, nodes=3, settings=SETTINGS) as cluster:
            return asyncio.run(all_of(cluster))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _restart_rows(load: Load, lost: list[str], rounds: int) -> list[Row]:
    samples = load.samples
    name = f"{rounds} rolling restarts, {len(samples):,} requests at {_RATE_PER_S}/s: failed"
    failed = failures(samples)
    detail = {"errors": failed[:20]}
    return [
        Row(name, len(failed), "", target=0, lower_is_better=True, detail=detail),
        Row("... p50", quantile(samples, 0.5), "s"),
        Row("... p99", quantile(samples, 0.99), "s", target=1, lower_is_better=True),
        Row("... slowest", quantile(samples, 1.0), "s"),
        Row("... acknowledged memories lost", len(lost), "", target=0, lower_is_better=True),
    ]


def _stop_rows(what: str, stop: Stop) -> list[Row]:
    failed = failures([*stop.before, *stop.during])
    return [
        Row(
            f"SIGSTOP of a node, {what}: failed",
            len(failed),
            "",
            target=0,
            lower_is_better=True,
            detail={"errors": failed[:20]},
        ),
        Row("... p99 before", quantile(stop.before, 0.99), "s"),
        Row("... hedge delay when it was stopped", stop.hedge_s, "s"),
        Row("... p99 while it stood", quantile(stop.during, 0.99), "s"),
        Row("... slowest while it stood", quantile(stop.during, 1.0), "s"),
        Row("... acknowledged memories lost", len(stop.lost), "", target=0, lower_is_better=True),
    ]


if __name__ == "__main__":
    benchmark_main("Restarts and stopped nodes, as clients see them", measure_all)
