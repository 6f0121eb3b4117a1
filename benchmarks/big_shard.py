"""One shard with very many memories: how long it takes to move under load, and to copy anew."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentmem_client import AsyncClient
from agentmem_node.cli.devcluster import DevCluster, is_ready
from agentmem_node.cli.devlayout import HOST, NodeFiles
from agentmem_node.model import operations as ops
from benchmarks.dataset import floats
from benchmarks.moving import (
    Move,
    ProbedLoad,
    broken_invariants,
    join,
    operate,
    owner_in,
    until_nothing_runs,
)
from benchmarks.report import Row
from benchmarks.rolling import MIX, failures, quantile

DIM = 384
SETTINGS = {"embedding.provider": "none", "embedding.dim": DIM, "cluster.shards": 8}
SHARD = "s00"
MOVE_S_MAX = 60.0
COPY_MB_PER_S_MIN = 50.0
PAUSE_S_MAX = 0.6
_OWNERS = 100
_BATCH = 250
_BATCHES_AT_ONCE = 4
_RESEED_S_MAX = 300.0
_POLL_S = 0.1
# Empty replicas weigh less.
_BEGUN_BYTES = 4 << 20


@dataclass(slots=True)
class Reseed:
    """A node that lost its disk. Seconds since its start."""

    ready_s: float  # until it answered that it is ready
    served_s: float  # until it had a replica of the big shard that had applied everything
    copied_bytes: int  # that its replicas weigh then, the journal left out
    copy_s: float  # from the first byte of any shard's replica to `served_s`


async def fill(client: AsyncClient, memories: int, progress: Callable[[str], None]) -> float:
    """Put the memories, each with a vector, into `SHARD`; memories a second."""
    topology = await client.cluster()
    owners = [owner_in(topology, SHARD, number) for number in range(_OWNERS)]
    begun = time.perf_counter()
    batches = _batches(owners, memories)
    stored = 0

    async def send() -> None:
        nonlocal stored
        for batch in batches:
            added = await client.add_many(batch, batch_size=_BATCH)
            if added.errors:
                raise added.errors[0][1]
            before, stored = stored, stored + len(batch)
            if before * 10 // memories != stored * 10 // memories:
                progress(f"{stored:,} of {memories:,} memories are stored")

    await asyncio.gather(*(send() for _ in range(_BATCHES_AT_ONCE)))
    return memories / (time.perf_counter() - begun)


def _batches(owners: list[str], memories: int) -> Iterator[list[dict[str, Any]]]:
    """Of one owner each, as one user's application sends them."""
    rng = np.random.default_rng(7)
    for start in range(0, memories, _BATCH):
        owner = owners[start // _BATCH % len(owners)]
        vectors = rng.standard_normal((min(_BATCH, memories - start), DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield [
            {
                "content": f"Parcel {start + at} of {owner} stands on shelf {at % 7}",
                "user_id": owner,
                "vector": floats(vector),
            }
            for at, vector in enumerate(vectors)
        ]


async def reseed(cluster: DevCluster, node: NodeFiles) -> Reseed:
    """Stop a node, empty its data directory, start it, and wait until it has the shard again.

    Raises TimeoutError when it has not in time.
    """
    await asyncio.to_thread(cluster.terminate, node.id)
    data = node.directory / "data"
    shutil.rmtree(data)
    begun = time.perf_counter()
    await asyncio.to_thread(cluster.restart, node.id, wait_s=0)
    ready_s = served_s = first_s = 0.0
    async with asyncio.timeout(_RESEED_S_MAX):
        while not (ready_s and served_s):
            now_s = time.perf_counter() - begun
            if not first_s and _bytes_below(data / "shards") > _BEGUN_BYTES:
                first_s = now_s
            if not ready_s and await asyncio.to_thread(is_ready, node):
                ready_s = now_s
            if not served_s and await asyncio.to_thread(_holds_all, cluster, node):
                served_s = now_s
            await asyncio.sleep(_POLL_S)
    whole = _bytes_below(data / "shards")
    return Reseed(ready_s, served_s, whole, max(_POLL_S, served_s - first_s))


def _holds_all(cluster: DevCluster, node: NodeFiles) -> bool:
    """Whether its replica of the shard has as many memories as that of any other node, or nearly.

    Writes go on meanwhile, and the nodes are asked one after the other.
    """
    own = _memories(node)
    others = [_memories(other) or 0 for other in cluster.nodes if other is not node]
    return own is not None and own >= 0.999 * max(others)


def _memories(node: NodeFiles) -> int | None:
    """In the node's own replica of the shard; None without one."""
    connection = http.client.HTTPConnection(HOST, node.port, timeout=2.0)
    try:
        connection.request("GET", "/api/v1/cluster")
        told = json.loads(connection.getresponse().read())
        count = told["shards"][SHARD].get("memories")
        return count if isinstance(count, int) else None
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # a file of a copy that was just renamed
    return total


async def measure(cluster: DevCluster, memories: int, progress: Callable[[str], None]) -> list[Row]:
    async with AsyncClient(cluster.urls) as client:
        rate = await fill(client, memories, progress)
        load = ProbedLoad(client, MIX)
        await load.learn()
        await load.fill()
        newcomer = await join(cluster)
        progress(f"{SHARD} is moved to {newcomer.id}")
        async with load.running():
            wish = ops.OperationWish(kind="move", shard=SHARD, node=newcomer.id)
            (move,) = await operate(cluster, load, wish)
            topology = await client.cluster()
            shard = topology.shards[SHARD]
            # Not the newcomer: the founders' settings lie beside their data, not in it.
            victim = next(
                cluster.node(name)
                for name in shard.members
                if name not in (shard.leader, newcomer.id)
            )
            progress(f"{victim.id} loses its disk")
            again = await reseed(cluster, victim)
            progress("its other replicas are mended, and the rest is spread evenly")
            await until_nothing_runs(cluster)
            moves = await operate(cluster, load, ops.OperationWish(kind="rebalance"))
            progress(f"{SHARD} is split")
            (split,) = await operate(cluster, load, ops.OperationWish(kind="split", shard=SHARD))
        lost = await load.lost()
        broken = await broken_invariants(cluster)
    failed = [*failures(load.samples), *load.probe_errors]
    return [
        Row(f"{memories:,} memories with vectors put into one shard", rate, "1/s"),
        *_move_rows(move, memories),
        *_reseed_rows(again),
        Row("shards moved afterwards, to be even again", len(moves), ""),
        Row(f"that shard split in two under load ({memories:,})", split.took_s, "s"),
        Row("... longest write to it meanwhile", split.pause_s, "s", PAUSE_S_MAX, True),
        Row("requests in all this time", len(load.samples) + len(load.probes), ""),
        Row("... failed", len(failed), "", 0, True, {"errors": failed[:20]}),
        Row("... p99", quantile(load.samples, 0.99), "s"),
        Row("... slowest", quantile(load.samples, 1.0), "s"),
        Row("... acknowledged memories lost", len(lost), "", 0, True),
        Row("... findings of `cluster check`", len(broken), "", 0, True, {"broken": broken}),
    ]


def _move_rows(move: Move, memories: int) -> list[Row]:
    megabytes = move.copied_bytes / 1e6
    return [
        Row(f"a shard of {memories:,} moved under load", move.took_s, "s", MOVE_S_MAX, True),
        Row("... copied", megabytes, "MB"),
        Row("... copied at", megabytes / move.copy_s, "MB/s", COPY_MB_PER_S_MIN),
        Row("... longest write to it meanwhile", move.pause_s, "s", PAUSE_S_MAX, True),
    ]


def _reseed_rows(again: Reseed) -> list[Row]:
    megabytes = again.copied_bytes / 1e6
    return [
        Row("a node with an empty disk: start to ready", again.ready_s, "s"),
        Row("... start to a whole replica of that shard", again.served_s, "s"),
        Row("... of all its replicas", megabytes, "MB"),
        Row("... copied at", megabytes / again.copy_s, "MB/s", COPY_MB_PER_S_MIN),
    ]
