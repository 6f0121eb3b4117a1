"""A node whose own replica is slow or cut off: who answers then, and in what time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.errors import AgentMemError, NoQuorum
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.host import AsyncGroup
from agentmem_cluster.realtime import RealClock, RealRng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config_keys import SearchSection
from agentmem_node.engine.shard import Shard
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.model import requests as rq
from agentmem_node.model.commands import Add, Write, encode_write
from agentmem_node.model.ids import format_id, new_id
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Scope
from agentmem_node.service.contract import Caller
from agentmem_node.service.drafts import Draft
from agentmem_node.service.fanout import FanOut
from agentmem_node.service.read import Reads
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.search import Searches

HEDGE_S = 0.05
NOW_MS = 1_770_000_000_000


class Group:
    """A member that is asked for a read index: it leads, hears nothing, or is cut off."""

    needs_reseed = False

    def __init__(self, state: str) -> None:
        self.state = state
        self.asked = 0

    @property
    def is_leader(self) -> bool:
        return self.state == "leads"

    async def read_index(self, *, deadline: float) -> int:
        self.asked += 1
        if self.state == "waits":
            await asyncio.sleep(30)
        if self.state == "cut off":
            raise NoQuorum("no majority answered")
        return 0


def travelled(value: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


class Wire:
    """Calls from one node straight to the handlers of the other; what travels is kept."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any], float]] = []

    def is_up(self, _peer: str) -> bool:
        return True

    async def call(self, peer: str, method: str, body: dict[str, Any], *, timeout: float) -> Any:
        self.calls.append((method, body, timeout))
        answer = await self.handlers[method](
            peer, msgspec.msgpack.decode(msgspec.msgpack.encode(body))
        )
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer))


class Replica:
    def __init__(self, name: str, folder: Path, group: Group, wire: Wire) -> None:
        self.clock = RealClock()
        self.routing = Routing(name, cast("Link", wire), self.clock)
        self.routing.map = ShardMap.initial(["a", "b"], shards=1, replication=2)
        (info,) = self.routing.map.shards.values()
        self.shard = Shard.open(folder / name, info.id, dim=0, index_factory=ShardIndex)
        machine = EpochMachine(self.shard, 1)
        self.routing.local[info.id] = LocalShard(
            info, cast("AsyncGroup", group), self.shard, machine
        )
        limits = Limits()
        fan_out = FanOut(self.routing, self.clock, HEDGE_S)
        self.reads = Reads(self.routing, fan_out, clock=self.clock, limits=limits)
        self.searches = Searches(
            self.routing,
            self.reads,
            clock=self.clock,
            limits=limits,
            dim=0,
            embedder=None,
            settings=SearchSection(),
        )

    def search(self, seconds: float = 5.0) -> tuple[list[str], float]:
        """(ids that "tea" finds, seconds that it took)."""

        async def run() -> tuple[list[str], float]:
            begun = self.clock.monotonic()
            caller = Caller("t", "k", begun + seconds)
            found = await self.searches.search(caller, rq.SearchRequest(query="tea", user_id="ana"))
            assert found.partial == []
            return [format_id(hit.id) for hit in found.hits], self.clock.monotonic() - begun

        return asyncio.run(run())


class Two:
    """Nodes `a` and `b` with equal replicas of the one shard; `b` leads."""

    def __init__(self, folder: Path) -> None:
        self.wire = Wire()
        self.group = Group("leads")
        self.a = Replica("a", folder, self.group, self.wire)
        self.b = Replica("b", folder, Group("leads"), Wire())
        self.wire.handlers = {
            "search.statistics": self.b.searches.on_statistics,
            "search.candidates": self.b.searches.on_candidates,
            "search.records": self.b.searches.on_records,
            "read.get": self.b.reads.on_get,
        }
        ops = []
        for number, text in enumerate(("green tea", "tea", "coffee", "black tea with milk")):
            key = new_id(NOW_MS + number, 5, RealRng())
            draft = Draft(text, Scope(user_id="ana"), "semantic", 0.5, [], {}, None, None, None)
            record = msgspec.json.encode(draft.to_memory(format_id(key), NOW_MS + number))
            ops.append(Add(key, record, None, NOW_MS + number, None))
        command = encode_write(Write(b"1" * 16, b"\0" * 8, "t", NOW_MS, tuple(ops)))
        for replica in (self.a, self.b):
            replica.shard.apply([Entry(1, 1, command)])
        self.usual, _ = self.a.search()
        assert len(self.usual) == 3 and self.wire.calls == []


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    yield made
    made.a.shard.close()
    made.b.shard.close()


def test_a_search_whose_own_replica_does_not_catch_up_is_answered_by_another(two: Two) -> None:
    two.group.state = "waits"
    found, took_s = two.a.search()
    assert found == two.usual, "the order must not depend on who answers"
    assert HEDGE_S <= took_s < 10 * HEDGE_S
    # It is asked last for a moment: who comes next does not wait for it at all... but looks.
    asked = two.group.asked
    _, took_s = two.a.search()
    assert took_s < 10 * HEDGE_S
    assert two.group.asked == asked + 1


def test_a_search_on_a_replica_without_a_quorum_is_answered_by_another(two: Two) -> None:
    two.group.state = "cut off"
    found, took_s = two.a.search()
    assert found == two.usual
    assert took_s < 10 * HEDGE_S


def test_without_another_replica_the_refusal_of_the_own_one_is_told(two: Two) -> None:
    two.group.state = "cut off"
    two.wire.is_up = lambda _peer: False  # type: ignore[method-assign]
    with pytest.raises(NoQuorum):
        two.a.search()


def test_a_peer_is_told_what_is_left_of_the_time_less_the_way_back(two: Two) -> None:
    two.group.state = "cut off"
    two.a.search(seconds=2.0)
    assert len(two.wire.calls) == 2
    for _method, body, timeout_s in two.wire.calls:
        assert timeout_s <= 2.0
        assert 1_500 < body["left_ms"] <= (timeout_s - 0.04) * 1000
    lefts = [body["left_ms"] for _, body, _ in two.wire.calls]
    assert lefts == sorted(lefts, reverse=True), "each round has less time than the one before"


def test_the_next_fan_out_asks_first_whom_the_last_one_did_not_wait_for_in_vain() -> None:
    asked: list[str] = []

    async def ask(node: str, shards: Sequence[str]) -> dict[str, str | AgentMemError]:
        asked.append(node)
        if node == "a":
            await asyncio.sleep(30)
        return dict.fromkeys(shards, node)

    class Outside(Routing):
        def is_connected(self, peer: str) -> bool:
            return True

    async def run() -> None:
        clock = RealClock()
        routing = Outside("outside", None, clock)
        routing.map = ShardMap.initial(["a", "b"], shards=1, replication=2)
        fan_out = FanOut(routing, clock, HEDGE_S)
        for first in ("a", "b", "b"):
            asked.clear()
            found = await fan_out.gather(["s00"], ask, clock.monotonic() + 5)
            assert found.answers == {"s00": "b"}
            assert asked[0] == first

    # Members are asked in the order of the map unless a leader is known.
    asyncio.run(run())
