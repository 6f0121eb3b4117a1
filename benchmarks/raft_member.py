"""One member of the group that `benchmarks.raft` measures: the real host, link and journal.

Started as a child process; takes its orders as JSON lines on standard input and answers each on
standard output. The load is made inside the leader, as the node's own write path makes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvloop

from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.link.link import Link
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.raft.api import Entry, GroupSpec
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.realtime import RealClock, RealDisk, RealRng

CLUSTER = "bench"
PROPOSAL_S_MAX = 20.0


class Register:
    """The smallest state machine: it remembers the last command and how many there were."""

    def __init__(self) -> None:
        self.applied_index = 0
        self.durable_index = 0
        self.count = 0
        self.last = b""

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        first = self.count
        self.count += len(entries)
        self.last = entries[-1].command
        self.applied_index = entries[-1].index
        return list(range(first, self.count))

    def checkpoint(self) -> None:
        return None

    def checkpoint_done(self, job: Any) -> None: ...

    def digest(self) -> bytes:
        return b""

    def close(self) -> None: ...


async def load(groups: list[AsyncGroup], clock: RealClock, order: dict[str, Any]) -> dict[str, Any]:
    """Keep `inflight` proposals of `size` bytes on their way in each group for `seconds`."""
    commands = [os.urandom(order["size"]) for _ in range(64)]
    latencies: list[float] = []
    end_s = time.perf_counter() + order["seconds"]

    async def worker(group: AsyncGroup, number: int) -> None:
        turn = number
        while (begun_s := time.perf_counter()) < end_s:
            turn += 1
            await group.propose(commands[turn % 64], deadline=clock.monotonic() + PROPOSAL_S_MAX)
            latencies.append(time.perf_counter() - begun_s)

    begun_s = time.perf_counter()
    await asyncio.gather(
        *(worker(group, number) for group in groups for number in range(order["inflight"]))
    )
    seconds = time.perf_counter() - begun_s
    latencies.sort()
    return {
        "rate": len(latencies) / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
    }


async def reads(
    groups: list[AsyncGroup], clock: RealClock, order: dict[str, Any]
) -> dict[str, Any]:
    latencies: list[float] = []
    end_s = time.perf_counter() + order["seconds"]

    async def worker(group: AsyncGroup) -> None:
        while (begun_s := time.perf_counter()) < end_s:
            await group.read_index(deadline=clock.monotonic() + PROPOSAL_S_MAX)
            latencies.append(time.perf_counter() - begun_s)

    begun_s = time.perf_counter()
    await asyncio.gather(*(worker(g) for g in groups for _ in range(order["inflight"])))
    seconds = time.perf_counter() - begun_s
    latencies.sort()
    return {"rate": len(latencies) / seconds, "p50_ms": latencies[len(latencies) // 2] * 1e3}


async def serve(config: dict[str, Any]) -> None:
    name, names = config["name"], sorted(config["ports"])
    peers = {peer: f"127.0.0.1:{port}" for peer, port in config["ports"].items()}
    clock = RealClock()
    journal = Journal.open(RealDisk(config["data"]))
    tls = LinkTls.load_folder(config["certificates"], CLUSTER, name)
    link = Link(name, ("127.0.0.1", config["ports"][name]), peers, tls, clock, cluster_id=CLUSTER)
    host = Host(
        name, journal, link, clock, RealRng(), RaftSettings(), on_fatal=lambda error: os._exit(3)
    )
    for number in range(config["groups"]):
        host.add_group(GroupSpec(f"g{number:02}", 1, tuple(names)), Register())
    await host.start()
    await link.start()
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        leading = [group for group in host.groups.values() if group.is_leader]
        if order["do"] == "status":
            known = sum(group.leader is not None for group in host.groups.values())
            answer: Any = {"leading": len(leading), "known": known}
        elif order["do"] == "spread":
            for number, group in enumerate(host.groups.values()):
                if group.is_leader and names[number % len(names)] != name:
                    host.core.transfer(group.spec.id, names[number % len(names)])
            host.wake()
            answer = {}
        elif order["do"] == "load":
            answer = await load(leading, clock, order) if leading else None
        else:
            answer = await reads(list(host.groups.values()), clock, order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    await host.stop()
    await link.close()
    journal.close()


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.argv[1])))
