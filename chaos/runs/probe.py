"""Asks nodes that are cut off from a majority, and notes how they refuse."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from agentmem_chaos.checkers.base import Refusal
from agentmem_chaos.hosts.base import Hosts
from agentmem_client import Topology

# A leader that was cut off steps down after about one election timeout: only then is it settled.
SETTLE_S = 2.0
# Far beyond what is claimed: a node that only refuses because the client's time is up is seen.
ASK_S_MAX = 10.0
_OWNERS_TRIED = 10_000


def without_majority(
    sides: Sequence[frozenset[str]], members: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Node to the shards of which its side has no majority."""
    found: dict[str, list[str]] = {}
    for side in sides:
        lost = [
            shard
            for shard, replicas in sorted(members.items())
            if 2 * len(side & set(replicas)) <= len(replicas)
        ]
        for node in sorted(side):
            if lost:
                found[node] = lost
    return found


def owner_in(view: Mapping[str, Any], shard: str) -> str:
    """A user id whose memories lie in the shard."""
    topology = Topology.read(view)
    for number in range(_OWNERS_TRIED):
        found = topology.shard_of_owner(f"user:probe-{number}")
        if found is not None and found.id == shard:
            return f"probe-{number}"
    raise LookupError(f"no owner was found in shard {shard}")


async def probe(
    hosts: Hosts, node: str, shard: str, owner: str, now_s: Callable[[], float]
) -> list[Refusal]:
    """A write, a linearizable list and a linearizable search, at once."""
    memory = {"content": "asked of a minority", "user_id": owner}
    search = {"query": "asked", "user_id": owner}
    asks: list[tuple[str, str, str, object]] = [
        ("write", "POST", "/memories", memory),
        ("list", "GET", f"/memories?user_id={owner}", None),
        ("search", "POST", "/memories/search", search),
    ]
    async with aiohttp.ClientSession() as session:
        told = await asyncio.gather(
            *(_ask(session, hosts, node, shard, ask, now_s) for ask in asks)
        )
    return [refusal for refusal in told if refusal is not None]


async def _ask(
    session: aiohttp.ClientSession,
    hosts: Hosts,
    node: str,
    shard: str,
    ask: tuple[str, str, str, object],
    now_s: Callable[[], float],
) -> Refusal | None:
    """None when nothing listens: a node that was restarted and does not serve yet says nothing."""
    name, method, path, document = ask
    at_s, began = now_s(), time.monotonic()
    status, code = 0, ""
    try:
        async with (
            asyncio.timeout(ASK_S_MAX),
            session.request(
                method,
                f"{hosts.url(node)}/api/v1{path}",
                data=None if document is None else json.dumps(document),
                headers={
                    "Authorization": f"Bearer {hosts.api_key}",
                    "Content-Type": "application/json",
                    "X-AgentMem-Deadline-Ms": str(int(ASK_S_MAX * 1_000)),
                },
            ) as answer,
        ):
            status = answer.status
            code = str((await answer.json()).get("code", ""))
    except aiohttp.ClientConnectorError:
        return None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        code = code or type(error).__name__
    return Refusal(node, shard, name, at_s, time.monotonic() - began, status, code)
