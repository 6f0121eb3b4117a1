"""A shard moves between real nodes: nothing acknowledged is lost, and nobody is refused."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from agentmem_cluster.epochs.change import Change
from tests.epochs.conftest import Cluster, run


def move(cluster: Cluster, shard: str, members: list[str]) -> Change:
    leader = cluster.meta_leader()
    assert leader is not None and leader._membership is not None and leader._membership.view
    info = leader._membership.view.map.shards[shard]
    target = replace(
        info,
        epoch=info.epoch + 1,
        members=tuple(sorted(members)),
        preferred_leader=members[0],
    )
    return Change(f"move-{info.epoch}", shard, info.epoch, info.members, (target,))


def test_a_shard_moves_while_it_is_written_and_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"])
        await cluster.start("n1", "n2", "n3")
        await cluster.admit("n4")
        await cluster.start("n4")
        try:
            acknowledged: dict[str, str] = {}
            write_s: list[float] = []
            read_s: list[float] = []
            stop = asyncio.Event()

            async def write(number: int) -> None:
                count = 0
                while not stop.is_set():
                    text = f"memory {number} {count}"
                    begun = time.monotonic()
                    node = list(cluster.nodes.values())[count % len(cluster.nodes)]
                    memory_id = await cluster.add(f"user{number}-{count % 7}", text, through=node)
                    write_s.append(time.monotonic() - begun)
                    acknowledged[memory_id] = text
                    count += 1

            async def read() -> None:
                count = 0
                while not stop.is_set():
                    await asyncio.sleep(0)
                    if not acknowledged:
                        continue
                    memory_id = list(acknowledged)[-1 - count % min(50, len(acknowledged))]
                    node = list(cluster.nodes.values())[count % len(cluster.nodes)]
                    begun = time.monotonic()
                    found = await cluster.read(memory_id, through=node)
                    read_s.append(time.monotonic() - begun)
                    assert acknowledged[memory_id].encode() in bytes(found.memory)
                    count += 1

            tasks = [asyncio.create_task(write(n)) for n in range(4)]
            tasks += [asyncio.create_task(read()) for _ in range(2)]
            await cluster.until(lambda: len(acknowledged) > 200, "some writes")
            for members in (["n4", "n2", "n3"], ["n1", "n4", "n2"], ["n3", "n1", "n2"]):
                await cluster.until(cluster.meta_leader, "a leader of the meta group")
                leader = cluster.meta_leader()
                assert leader is not None
                change = move(cluster, "s00", members)
                assert await leader.changes.begin(change) == ""
                await cluster.until(
                    lambda c=change: all(
                        n._routing.map is not None
                        and n._routing.map.shards["s00"].epoch == c.to_epoch
                        and not n._membership.view.changes
                        for n in cluster.nodes.values()
                    ),
                    f"epoch {change.to_epoch} on {members}",
                )
                done = [t for t in tasks if t.done()]
                for task in done:
                    task.result()
            stop.set()
            await asyncio.gather(*tasks)
            print(
                f"{len(acknowledged)} writes, {len(read_s)} reads; the longest write "
                f"{max(write_s) * 1000:.0f} ms, the longest read {max(read_s) * 1000:.0f} ms"
            )
            for memory_id, text in acknowledged.items():
                found = await cluster.read(memory_id)
                assert text.encode() in bytes(found.memory)
            holders = {n for n, node in cluster.nodes.items() if "s00" in node._routing.local}
            assert holders == {"n1", "n2", "n3"}
            assert max(write_s) < 2.0
        finally:
            await cluster.stop()

    run(scenario, 110)
