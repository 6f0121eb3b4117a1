"""Shards that move while they are written: what an operator does to a cluster, at a bad time.

An operation is asked of any node that runs, goes on whichever node fails, and must end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import aiohttp

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.base import Field, Nemesis, both_ways
from agentmem_chaos.runs.ready import wait_ready

PATH = "/api/v1/cluster/operations"
TOKENS_PATH = "/api/v1/cluster/join-tokens"
NODES_MAX = 6
SHARDS_MAX = 12
END_S_MAX = 60.0
ASK_S_MAX = 15.0
_BEGIN_TRIES = 20
_POLL_S = 0.2
_KILL_AFTER_S = (0.0, 0.8)
_CUT_S = 2.5


async def ask(field: Field, method: str, path: str, wish: Mapping[str, Any] | None = None) -> Any:
    """The answer of some node that runs. Raises ChaosError when none gives one in time."""
    last = "no node runs"
    # The same key in every try: what was begun by an answer that was lost is not begun twice.
    headers = {
        "Authorization": f"Bearer {field.hosts.api_key}",
        "Idempotency-Key": f"chaos-{secrets.token_hex(8)}",
    }
    async with aiohttp.ClientSession(headers=headers) as session:
        for turn in range(_BEGIN_TRIES):
            node = field.nodes[turn % len(field.nodes)]
            if not field.hosts.is_running(node):
                continue
            try:
                async with (
                    asyncio.timeout(ASK_S_MAX),
                    session.request(method, field.hosts.url(node) + path, json=wish) as answer,
                ):
                    said = await answer.json()
                    if answer.status < 300:
                        return said
                    last = f"{node} answered {answer.status}: {said.get('detail')}"
                    if answer.status < 500 and answer.status != 409:
                        break
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                last = f"{node}: {error!r}"
            await asyncio.sleep(_POLL_S)
    raise ChaosError(f"{method} {path} {dict(wish or {})}: {last}")


async def ended(field: Field, operation_id: str) -> str:
    """The state in which it ended. Raises ChaosError when it does not end in time."""
    deadline = time.monotonic() + END_S_MAX
    while True:
        told = await ask(field, "GET", f"{PATH}/{operation_id}")
        if told["state"] != "running":
            return f"{told['state']} {told['message']}".strip()
        if time.monotonic() > deadline:
            raise ChaosError(f"Operation {operation_id} did not end: {told}")
        await asyncio.sleep(_POLL_S)


class _Operation(Nemesis):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS})
    hold_s: ClassVar[tuple[float, float]] = (0.5, 1.5)
    wants_whole_cluster: ClassVar[bool] = True

    def wish(self, field: Field) -> dict[str, str]:
        raise NotImplementedError

    async def meanwhile(self, field: Field, wish: Mapping[str, str]) -> str:
        return ""

    async def strike(self, field: Field) -> str:
        wish = self.wish(field)
        begun = time.monotonic()
        operation = await ask(field, "POST", PATH, wish)
        more = await self.meanwhile(field, wish)
        state = await ended(field, operation["id"])
        told = " ".join(wish.values())
        if not state.startswith("done"):
            raise ChaosError(f"{told}{more} ended as {state}")
        return f"{told}{more}, {len(operation['steps'])} steps, {time.monotonic() - begun:.1f} s"

    async def undo(self, field: Field) -> None:
        for node in sorted(self.victims):
            if not field.hosts.is_running(node):
                await field.hosts.start(node)


def a_move(field: Field) -> dict[str, str]:
    members = field.members()
    possible = [
        (shard, node)
        for shard, replicas in sorted(members.items())
        for node in field.nodes
        if node not in replicas
    ]
    if not possible:
        raise ChaosError("Every node has a replica of every shard: run with --nodes 4 or more.")
    shard, node = field.chance.choice(possible)
    return {"kind": "move", "shard": shard, "node": node}


class MoveShard(_Operation):
    name: ClassVar[str] = "move-shard"
    description: ClassVar[str] = "a shard moves to another node (more than three nodes)"

    def wish(self, field: Field) -> dict[str, str]:
        return a_move(field)


class MoveAndKill(_Operation):
    """The leader of the shard dies in the middle, is started, and the operation must still end."""

    name: ClassVar[str] = "move-and-kill"
    description: ClassVar[str] = "a shard moves, and its leader is killed meanwhile"

    def wish(self, field: Field) -> dict[str, str]:
        return a_move(field)

    async def meanwhile(self, field: Field, wish: Mapping[str, str]) -> str:
        await asyncio.sleep(field.chance.uniform(*_KILL_AFTER_S))
        node = field.leaders().get(wish.get("shard", ""), field.a_leader())
        self.victims = frozenset({node})
        await field.hosts.kill(node)
        await field.hosts.start(node)
        return f", {node} killed"


class MoveAndCut(_Operation):
    """The leader of the shard is cut off in the middle, long enough for another to be elected."""

    name: ClassVar[str] = "move-and-cut"
    description: ClassVar[str] = "a shard moves, and its leader is cut off for a while meanwhile"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS, Need.PARTITION})

    def wish(self, field: Field) -> dict[str, str]:
        return a_move(field)

    async def meanwhile(self, field: Field, wish: Mapping[str, str]) -> str:
        await asyncio.sleep(field.chance.uniform(*_KILL_AFTER_S))
        node = field.leaders().get(wish["shard"], field.a_leader())
        self.victims = frozenset({node})
        await field.hosts.cut(both_ways(self.victims, frozenset(field.nodes) - self.victims))
        await asyncio.sleep(_CUT_S)
        await field.hosts.cut(frozenset())
        return f", {node} cut off for {_CUT_S:g} s"

    async def undo(self, field: Field) -> None:
        await field.hosts.cut(frozenset())
        await super().undo(field)


def a_split(field: Field) -> dict[str, str]:
    """Of any shard; when there are many, replicas are spread instead."""
    shards = sorted(field.members())
    if len(shards) >= SHARDS_MAX:
        return {"kind": "rebalance"}
    return {"kind": "split", "shard": field.chance.choice(shards)}


class SplitShard(_Operation):
    name: ClassVar[str] = "split-shard"
    description: ClassVar[str] = "a shard becomes two"

    def wish(self, field: Field) -> dict[str, str]:
        return a_split(field)


class SplitAndKill(MoveAndKill):
    name: ClassVar[str] = "split-and-kill"
    description: ClassVar[str] = "a shard becomes two, and its leader is killed meanwhile"

    def wish(self, field: Field) -> dict[str, str]:
        return a_split(field)


class Drain(_Operation):
    name: ClassVar[str] = "drain-node"
    description: ClassVar[str] = "a node gives all its replicas away, and may have some again"

    def __init__(self) -> None:
        super().__init__()
        self._drained = ""

    def wish(self, field: Field) -> dict[str, str]:
        if len(field.nodes) <= 3:
            raise ChaosError("A node of three cannot be drained: run with --nodes 4 or more.")
        self._drained = field.a_node()
        return {"kind": "drain", "node": self._drained}

    async def undo(self, field: Field) -> None:
        await super().undo(field)
        if self._drained:
            wish = {"kind": "undrain", "node": self._drained}
            await ended(field, (await ask(field, "POST", PATH, wish))["id"])


class Rebalance(_Operation):
    name: ClassVar[str] = "rebalance"
    description: ClassVar[str] = "replicas and leaders are spread evenly"

    def wish(self, field: Field) -> dict[str, str]:
        return {"kind": "rebalance"}


class JoinNode(_Operation):
    """Each strike adds a node, as long as there is room, and has shards given to it."""

    name: ClassVar[str] = "join-node"
    description: ClassVar[str] = "a new node joins with a token, and is given shards"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS, Need.NEW_NODES})

    def wish(self, field: Field) -> dict[str, str]:
        return {"kind": "rebalance"}

    async def strike(self, field: Field) -> str:
        if len(field.nodes) >= NODES_MAX:
            return f"there are {NODES_MAX} nodes already: {await super().strike(field)}"
        token = (await ask(field, "POST", TOKENS_PATH, {"ttl_s": 60, "uses": 1}))["token"]
        node = await field.hosts.join(token)
        self.victims = frozenset({node})
        ready_s = await wait_ready(field.hosts, (node,), END_S_MAX)
        return f"{node} is ready after {ready_s:.1f} s; {await super().strike(field)}"


MEMBERSHIP: tuple[type[Nemesis], ...] = (
    MoveShard,
    MoveAndKill,
    MoveAndCut,
    SplitShard,
    SplitAndKill,
    Drain,
    Rebalance,
    JoinNode,
)
