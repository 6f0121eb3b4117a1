"""Many writers and a client that knows its cluster, while nodes are killed and paused."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from agentmem_client import AgentMemError, AsyncClient
from agentmem_node.cli.devcluster import DevCluster

pytestmark = pytest.mark.process

SETTINGS = {"embedding.provider": "none", "embedding.dim": 0, "cluster.shards": 8}
WRITERS = 12


def test_every_acknowledged_write_is_there_exactly_once_whatever_happens_to_nodes(
    tmp_path: Path,
) -> None:
    acknowledged: dict[str, str] = {}
    failed: list[str] = []

    async def write(memory: AsyncClient, writer: int, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            text = f"writer{writer} parcel{number}"
            try:
                added = await memory.add(text, user_id=f"user-{writer}", deadline_s=20.0)
                acknowledged[text] = added.memories[0].id
            except AgentMemError as error:
                failed.append(f"{text}: {error.message}")
            await asyncio.sleep(0.01)

    async def disturb(cluster: DevCluster, stop: asyncio.Event) -> None:
        rng = random.Random(7)
        try:
            for how in ("kill", "pause", "terminate", "kill"):
                await asyncio.sleep(0.7)
                node = rng.randint(1, 3)
                if how == "pause":
                    cluster.pause(node)
                    await asyncio.sleep(2.0)
                    cluster.resume(node)
                else:
                    await asyncio.to_thread(getattr(cluster, how), node)
                    await asyncio.sleep(1.0)
                    await asyncio.to_thread(cluster.restart, node)
        finally:
            stop.set()

    async def story(cluster: DevCluster) -> dict[str, list[str]]:
        stop = asyncio.Event()
        found: dict[str, list[str]] = {}
        async with AsyncClient(cluster.urls) as memory:
            writers = (write(memory, writer, stop) for writer in range(WRITERS))
            await asyncio.gather(disturb(cluster, stop), *writers)
            for writer in range(WRITERS):
                async for stored in memory.list(user_id=f"user-{writer}", limit=500):
                    found.setdefault(stored.content, []).append(stored.id)
        return found

    with DevCluster(tmp_path, settings=SETTINGS) as cluster:
        found = asyncio.run(story(cluster))
        assert cluster.crashes() == []
    assert failed == []
    assert len(acknowledged) > 100
    assert found == {text: [memory_id] for text, memory_id in acknowledged.items()}
