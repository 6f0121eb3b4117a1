"""Waiting for nodes, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import aiohttp

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Hosts

PROBE_S_MAX = 1.0
_POLL_S = 0.05
# A node is ready without these replicas: others answer for them. Its shards have one vote less.
NOT_WHOLE = ("replica_damaged", "replica_missing", "replica_needs_reseed")


async def is_ready(session: aiohttp.ClientSession, url: str, but_for: Collection[str] = ()) -> bool:
    """Whether a node serves; not one that gives any of these reasons why something is amiss."""
    try:
        async with asyncio.timeout(PROBE_S_MAX), session.get(f"{url}/health/ready") as answer:
            said = await answer.json()
            reasons = said.get("reasons", {})
            return answer.status == 200 and not any(name in reasons for name in but_for)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return False


async def wait_ready(
    hosts: Hosts, nodes: Sequence[str], seconds: float, but_for: Collection[str] = ()
) -> float:
    """The seconds until all of them were ready at once. Raises ChaosError with the log's end."""
    began = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while True:
            ready = await asyncio.gather(
                *(is_ready(session, hosts.url(node), but_for) for node in nodes)
            )
            took_s = time.monotonic() - began
            if all(ready):
                return took_s
            late = next(n for n, is_up in zip(nodes, ready, strict=True) if not is_up)
            ended = not hosts.is_running(late)
            if ended or took_s > seconds:
                what = "ended" if ended else f"was not ready within {seconds:g} s"
                raise ChaosError(f"Node {late} {what}. Its log ends:\n{hosts.log_tail(late)}")
            await asyncio.sleep(_POLL_S)
