"""Real nodes, and a client that sends every write to two of them: each takes effect once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentmem_client import AsyncClient, NotFound, Policy
from agentmem_node.cli.devcluster import DevCluster
from benchmarks.rolling import SETTINGS

pytestmark = pytest.mark.process

# A millisecond is less than a write takes. A node that loses a race looks as if it stood still, and
# is left alone until a probe; that comes soon here, or nobody would be left for the next hedge.
HASTY = Policy(
    hedge_write_s_first=0.001,
    hedge_write_s_min=0.001,
    hedge_write_s_max=0.001,
    hedge_burst=1e9,
    breaker_s_first=0.01,
    breaker_s_max=0.01,
)
WRITERS = 8
ROUNDS = 12


class Counting(AsyncClient):
    """Counts the requests that were sent."""

    sent = 0

    async def _send(self, session: Any, request: Any) -> Any:
        self.sent += request.method != "GET"
        return await super()._send(session, request)


def test_writes_that_two_nodes_work_on_at_once_take_effect_once(tmp_path: Path) -> None:
    async def write(memory: AsyncClient, writer: int) -> None:
        user = f"writer-{writer}"
        for number in range(ROUNDS):
            (kept,) = (await memory.add(f"kept {number}", user_id=user)).memories
            for version in (2, 3):
                changed = await memory.update(kept.id, f"kept {number} v{version}")
                assert changed.version == version
            (gone,) = (await memory.add(f"gone {number}", user_id=user)).memories
            # The second of two deletes under one key must not find that nothing is there.
            await memory.delete(gone.id)
            with pytest.raises(NotFound):
                await memory.get(gone.id)

    async def story(urls: list[str]) -> tuple[int, list[list[tuple[str, int]]]]:
        async with Counting(urls, policy=HASTY) as memory:
            await asyncio.gather(*(write(memory, writer) for writer in range(WRITERS)))
            stored = [
                [(m.content, m.version) async for m in memory.list(user_id=f"writer-{writer}")]
                for writer in range(WRITERS)
            ]
            return memory.sent, stored

    with DevCluster(tmp_path, nodes=3, settings=SETTINGS) as cluster:
        sent, stored = asyncio.run(story(cluster.urls))
        assert cluster.crashes() == []
    writes = WRITERS * ROUNDS * 5
    print(f"{writes} writes, {sent} requests")
    assert sent > 1.5 * writes, "they were not hedged"
    expected = sorted((f"kept {number} v3", 3) for number in range(ROUNDS))
    assert [sorted(found) for found in stored] == [expected] * WRITERS
