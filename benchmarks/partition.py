"""A leader whose links are cut: how long writes stop, and how long until all is alike once healed.

    python -m benchmarks.partition [--scale 1] [--json FILE]

Three nodes on this machine reach each other through relays (`agentmem_node/console/wires.py`). Each
round cuts the leader of a shard off while its process goes on, under the constant load of
`benchmarks.rolling`; memories of that shard are added one after the other, and after some seconds
the links are healed. Converged: every node is ready, and all replicas of each shard are at one
entry with one digest, asked from outside.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agentmem_client import AgentMemError, AsyncClient
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.console.cutting import is_converged
from agentmem_node.console.wires import Wires
from benchmarks.report import Row, benchmark_main
from benchmarks.rolling import MIX, SETTINGS, Load, all_ready, failures, quantile

_ROUNDS = 10
_CUT_S = 4.0
_CONVERGED_S_MAX = 60.0
_WRITE_S_MAX = 30.0


@dataclass(slots=True)
class Partitions:
    """Seconds, one for each round."""

    first_write_s: list[float] = field(default_factory=list)
    converged_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    requests: int = 0
    slowest_s: float = 0.0
    lost: int = 0


async def cut_and_heal(
    cluster: DevCluster, wires: Wires, rounds: int, progress: Callable[[str], None]
) -> Partitions:
    """Raises RuntimeError when nothing is acknowledged, or not alike, for very long."""
    found = Partitions()
    async with AsyncClient(cluster.urls) as client:
        load = Load(client, MIX)
        await load.fill()
        for number in range(rounds):
            await all_ready(cluster)
            owner = f"owner-{number}"
            shard = (await client.cluster()).shard_of_owner(f"user:{owner}")
            if shard is None or shard.leader is None:
                raise RuntimeError(f"the shard of {owner} has no leader")
            progress(f"cut {number + 1} of {rounds}: {shard.leader}")
            async with load.running():
                cut_at = time.perf_counter()
                wires.cut(shard.leader)
                await _first_write(load, owner, cut_at)
                found.first_write_s.append(time.perf_counter() - cut_at)
                await asyncio.sleep(max(0.0, cut_at + _CUT_S - time.perf_counter()))
            healed_at = time.perf_counter()
            wires.heal(shard.leader)
            while not await asyncio.to_thread(is_converged, cluster.urls):
                if time.perf_counter() - healed_at > _CONVERGED_S_MAX:
                    raise RuntimeError("the replicas did not become alike")
                await asyncio.sleep(0.02)
            found.converged_s.append(time.perf_counter() - healed_at)
        found.lost = len(await load.lost())
        found.failed = failures(load.samples)
        found.requests = len(load.samples)
        found.slowest_s = quantile(load.samples, 1.0)
    return found


async def _first_write(load: Load, owner: str, cut_at: float) -> None:
    while True:
        try:
            await load.add(owner)
            return
        except AgentMemError as error:
            if time.perf_counter() - cut_at > _WRITE_S_MAX:
                raise RuntimeError("no write was acknowledged again") from error


def measure_all(scale: float, progress: Callable[[str], None]) -> list[Row]:
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    wires = Wires(dict)
    rounds = max(1, round(_ROUNDS * scale))
    try:
        with DevCluster(
            directory,
            nodes=3,
            settings=SETTINGS,
            dialled=lambda a, b: wires.address(a, b.id, b.peer),
        ) as cluster:
            found = asyncio.run(cut_and_heal(cluster, wires, rounds, progress))
    finally:
        wires.close()
        shutil.rmtree(directory, ignore_errors=True)
    return rows_of(found, rounds)


def rows_of(found: Partitions, rounds: int) -> list[Row]:
    writes, converged = sorted(found.first_write_s), sorted(found.converged_s)
    middle = len(writes) // 2
    detail = {"all": [round(one, 3) for one in converged]}
    return [
        Row(
            f"links of a leader cut to the next acknowledged write, {rounds} cuts: median",
            writes[middle],
            "s",
            detail={"all": [round(one, 3) for one in writes]},
        ),
        Row("... slowest", writes[-1], "s"),
        Row("healed to all replicas alike: median", converged[middle], "s", detail=detail),
        Row("... slowest", converged[-1], "s", target=5, lower_is_better=True),
        Row(
            f"... {found.requests:,} requests while it was cut off: failed",
            len(found.failed),
            "",
            target=0,
            lower_is_better=True,
            detail={"errors": found.failed[:20]},
        ),
        Row("... slowest of them", found.slowest_s, "s"),
        Row("... acknowledged memories lost", found.lost, "", target=0, lower_is_better=True),
    ]


if __name__ == "__main__":
    benchmark_main("Partitions", measure_all)
