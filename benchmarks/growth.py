"""A cluster grows from 3 nodes to 5 and back to 3 under load, and a big shard moves.

    python -m benchmarks.growth [--scale 1] [--memories 100000] [--json FILE]

1. Three nodes under a constant load of reads and writes (`benchmarks.rolling`); two more join with
   tokens, `rebalance` gives them their share, and then both are removed again.
2. `--memories` (0: none) are put into one shard, which is moved to a fourth node under the same
   load; then a node that holds it loses its disk, and is given it anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from agentmem_client import AsyncClient
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.model import operations as ops
from benchmarks import big_shard
from benchmarks.moving import Move, ProbedLoad, broken_invariants, join, operate
from benchmarks.report import Row, document, show
from benchmarks.rolling import MIX, SETTINGS, Sample, failures, quantile

TITLE = "A cluster that grows and shrinks, as clients see it"
PAUSE_S_P99 = 0.6
_MEMORIES = 100_000


@dataclass(slots=True)
class Growth:
    """What the load met while the cluster changed."""

    load: ProbedLoad
    moves: list[Move] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [*failures(self.load.samples), *self.load.probe_errors]


async def grow_and_shrink(
    cluster: DevCluster,
    *,
    joiners: int = 2,
    settle_s: float = 2.0,
    progress: Callable[[str], None] = lambda _text: None,
) -> Growth:
    """`joiners` nodes join, get their share, and are removed one after the other, under load."""
    async with AsyncClient(cluster.urls) as client:
        load = ProbedLoad(client, MIX)
        growth = Growth(load)
        await load.learn()
        await load.fill()
        async with load.running():
            await asyncio.sleep(settle_s)
            names = []
            for _ in range(joiners):
                names.append((await join(cluster)).id)
                progress(f"{names[-1]} has joined")
            growth.moves += await operate(cluster, load, ops.OperationWish(kind="rebalance"))
            progress(f"{len(growth.moves)} shards were moved")
            await asyncio.sleep(settle_s)
            for name in reversed(names):
                wish = ops.OperationWish(kind="remove", node=name)
                growth.moves += await operate(cluster, load, wish)
                await asyncio.to_thread(cluster.forget, name)
                progress(f"{name} was removed")
            await asyncio.sleep(settle_s)
        growth.lost = await load.lost()
        growth.broken = await broken_invariants(cluster)
    return growth


def share_of(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def growth_rows(growth: Growth, nodes: str) -> list[Row]:
    load, moves = growth.load, growth.moves
    requests = len(load.samples) + len(load.probes)
    rows = [
        Row(
            f"{nodes} nodes, {requests:,} requests at {load.rate_per_s:g}/s and more: failed",
            len(growth.failed),
            "",
            target=0,
            lower_is_better=True,
            detail={"errors": growth.failed[:20]},
        )
    ]
    reads = [sample for sample in load.samples if sample.kind != "add"]
    writes = [sample for sample in load.samples if sample.kind == "add"]
    writes += [Sample("add", due, took) for _, due, took in load.probes]
    for what, samples in (("reads", reads), ("writes", writes)):
        for name, share in (("p50", 0.5), ("p99", 0.99), ("slowest", 1.0)):
            rows.append(Row(f"... {what}: {name}", quantile(samples, share), "s"))
    copied = sum(move.copied_bytes for move in moves)
    return [
        *rows,
        Row("... shards moved", len(moves), ""),
        Row("... copied", copied / 1e6, "MB"),
        Row(
            "... pause of writes to the moving shard, p99 of the moves",
            share_of([move.pause_s for move in moves], 0.99),
            "s",
            target=PAUSE_S_P99,
            lower_is_better=True,
            detail={"all": [(move.shard, round(move.pause_s, 3)) for move in moves]},
        ),
        Row("... median", share_of([move.pause_s for move in moves], 0.5), "s"),
        Row("... acknowledged memories lost", len(growth.lost), "", 0, lower_is_better=True),
        Row(
            "... findings of `cluster check`",
            len(growth.broken),
            "",
            target=0,
            lower_is_better=True,
            detail={"broken": growth.broken},
        ),
    ]


def measure_all(memories: int, progress: Callable[[str], None]) -> list[Row]:
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    try:
        progress("3 nodes to 5, and back to 3")
        with DevCluster(directory / "growth", nodes=3, settings=SETTINGS) as cluster:
            rows = growth_rows(asyncio.run(grow_and_shrink(cluster, progress=progress)), "3-5-3")
        if memories:
            settings = big_shard.SETTINGS
            with DevCluster(directory / "big", nodes=3, settings=settings) as cluster:
                rows += asyncio.run(big_shard.measure(cluster, memories, progress))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the memories, 0 to 1")
    parser.add_argument("--memories", type=int, default=_MEMORIES, help="in the big shard")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = measure_all(
        round(arguments.memories * arguments.scale),
        lambda text: console.print(f"[dim]{text} ...[/]"),
    )
    show(TITLE, rows, Console())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document(TITLE, rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
