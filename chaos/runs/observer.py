"""Asks every node several times a second how it sees the cluster; keeps what changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from agentmem_chaos.hosts.base import Hosts

POLL_S = 0.2
ASK_S_MAX = 1.0


@dataclass(frozen=True, slots=True)
class LeaderChange:
    at_s: float
    shard: str
    term: int
    leader: str | None


async def ask_view(
    session: aiohttp.ClientSession, hosts: Hosts, node: str, seconds: float = ASK_S_MAX
) -> dict[str, Any] | None:
    """`GET /cluster` of one node; None when it does not answer with one in time."""
    headers = {"Authorization": f"Bearer {hosts.api_key}"}
    try:
        async with (
            asyncio.timeout(seconds),
            session.get(f"{hosts.url(node)}/api/v1/cluster", headers=headers) as answer,
        ):
            if answer.status != 200:
                return None
            view: dict[str, Any] = await answer.json()
            return view
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


async def ask_views(
    session: aiohttp.ClientSession, hosts: Hosts, seconds: float = ASK_S_MAX
) -> dict[str, dict[str, Any]]:
    """The views of the nodes that answer with one in time. Nodes that join meanwhile are not
    asked."""
    nodes = hosts.nodes
    views = await asyncio.gather(*(ask_view(session, hosts, node, seconds) for node in nodes))
    return {node: view for node, view in zip(nodes, views, strict=True) if view is not None}


@dataclass(slots=True)
class Observer:
    hosts: Hosts
    now_s: Callable[[], float]
    changes: list[LeaderChange] = field(default_factory=list)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    _leaders: dict[str, tuple[int, str]] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled."""
        async with aiohttp.ClientSession() as session:
            while True:
                fresh = await ask_views(session, self.hosts)
                self.views |= fresh
                self._note(fresh)
                await asyncio.sleep(POLL_S)

    def _note(self, fresh: Mapping[str, Mapping[str, Any]]) -> None:
        best: dict[str, tuple[int, str]] = {}
        for view in fresh.values():
            for shard, told in view["shards"].items():
                if told.get("leader") and "term" in told:
                    claim = (int(told["term"]), str(told["leader"]))
                    best[shard] = max(best.get(shard, claim), claim)
        for shard, (term, leader) in sorted(best.items()):
            known = self._leaders.get(shard)
            # A view that was asked before it heard of the new term says nothing new.
            if known is None or (term >= known[0] and (term, leader) != known):
                self._leaders[shard] = (term, leader)
                self.changes.append(LeaderChange(round(self.now_s(), 3), shard, term, leader))

    def leaders(self) -> dict[str, str]:
        return {shard: leader for shard, (_, leader) in self._leaders.items()}

    def newest_view(self) -> dict[str, Any] | None:
        """Of all nodes, the one with the newest shard map."""
        return max(self.views.values(), key=lambda view: int(view["version"]), default=None)

    def members(self) -> dict[str, tuple[str, ...]]:
        view = self.newest_view()
        shards = {} if view is None else view["shards"]
        return {shard: tuple(told["members"]) for shard, told in shards.items()}
