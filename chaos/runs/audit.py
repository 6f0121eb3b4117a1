"""What a calm cluster holds at the end, asked in every way that must agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import aiohttp

from agentmem_chaos.checkers.base import Inventory, Stored
from agentmem_chaos.checkers.cluster import digests_of
from agentmem_chaos.hosts.base import Hosts
from agentmem_chaos.runs.observer import ask_views
from agentmem_chaos.workloads.history import Op
from agentmem_chaos.workloads.memories import TOP_K, vector_of
from agentmem_client import AgentMemError, AsyncClient

QUIET_S_MAX = 20.0
SEARCHES_IN_BATCH = 25
_POLL_S = 0.1
_READ_S_MAX = 20.0


async def inventory(client: AsyncClient, owners: Iterable[str]) -> Inventory | None:
    """Every memory of these owners by a linearizable list; None when that is not answered."""
    try:
        return {
            owner: [
                Stored(memory.id, memory.content, memory.version)
                async for memory in client.list(user_id=owner, limit=1_000, deadline_s=_READ_S_MAX)
            ]
            for owner in sorted(owners)
        }
    except AgentMemError:
        return None


async def replica(hosts: Hosts, node: str, owners: Iterable[str]) -> Inventory | str:
    """The same from the replicas that this node has itself (shards elsewhere are forwarded).

    A text is how it refused: "500 internal: ...".
    """
    headers = {"Authorization": f"Bearer {hosts.api_key}"}
    found: dict[str, list[Stored]] = {}
    async with aiohttp.ClientSession(headers=headers) as session:
        for owner in sorted(owners):
            memories: list[Stored] = []
            cursor = None
            while True:
                asked = {"user_id": owner, "limit": "1000", "consistency": "eventual"}
                if cursor is not None:
                    asked["cursor"] = cursor
                try:
                    async with (
                        asyncio.timeout(_READ_S_MAX),
                        session.get(f"{hosts.url(node)}/api/v1/memories", params=asked) as answer,
                    ):
                        page = await answer.json()
                        if answer.status != 200:
                            return f"{answer.status} {page.get('code')}: {page.get('detail')}"
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    return f"no answer: {error!r}"
                memories += [Stored(m["id"], m["content"], m["version"]) for m in page["results"]]
                cursor = page["next_cursor"]
                if cursor is None:
                    break
            found[owner] = memories
    return found


async def searched(client: AsyncClient, ops: Sequence[Op]) -> dict[str, bool] | None:
    """Word to whether a search finds its memory, for what was added and not deleted."""
    deleted = {op.key for op in ops if op.kind == "delete"}
    added = [op for op in ops if op.kind == "add" and op.is_ok and op.key not in deleted]
    found: dict[str, bool] = {}
    try:
        for start in range(0, len(added), SEARCHES_IN_BATCH):
            part = added[start : start + SEARCHES_IN_BATCH]
            answers = await client.search_many(
                [
                    {
                        "query": op.key,
                        "user_id": op.owner,
                        "vector": vector_of(op.key),
                        "top_k": TOP_K,
                    }
                    for op in part
                ],
                deadline_s=_READ_S_MAX,
            )
            for op, answer in zip(part, answers, strict=True):
                found[op.key] = any(hit.id == op.result for hit in answer)
    except AgentMemError:
        return None
    return found


async def quiet_views(hosts: Hosts) -> Mapping[str, Mapping[str, Any]] | None:
    """Every node's view once all replicas are at one index, or as they are when that takes too
    long; None when a node does not answer."""
    deadline = time.monotonic() + QUIET_S_MAX
    async with aiohttp.ClientSession() as session:
        while True:
            views = await ask_views(session, hosts, 3.0)
            if len(views) == len(hosts.nodes) and _is_level(views):
                return views
            if time.monotonic() > deadline:
                return views if len(views) == len(hosts.nodes) else None
            await asyncio.sleep(_POLL_S)


def _is_level(views: Mapping[str, Mapping[str, Any]]) -> bool:
    replicas_by_shard = digests_of(views)
    return all(len(set(replicas.values())) == 1 for replicas in replicas_by_shard.values())
