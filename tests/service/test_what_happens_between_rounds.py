"""Searches and lists over several shards: deletes between the rounds, shards lost on the way,
and memories so long that no page may hold what a caller asks for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import pytest

from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.errors import InvalidField
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.host import AsyncGroup
from agentmem_cluster.realtime import RealClock, RealRng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config_keys import SearchSection
from agentmem_node.engine.shard import Shard
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.model import requests as rq
from agentmem_node.model.commands import Add, Delete, Op, Update, Write, encode_write
from agentmem_node.model.ids import format_id, new_id, parse_id
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.search import SearchAnswer
from agentmem_node.service.contract import Caller
from agentmem_node.service.drafts import Draft
from agentmem_node.service.fanout import FanOut, Gathered
from agentmem_node.service.read import Reads
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.search import Searches

NOW_MS = 1_770_000_000_000


class Led:
    """A group that has applied all there is."""

    is_leader = True
    needs_reseed = False

    async def read_index(self, *, deadline: float) -> int:
        return 0


class Node:
    def __init__(self, folder: Path) -> None:
        self.clock = RealClock()
        routing = Routing("a", None, self.clock)
        routing.map = ShardMap.initial(["a"], shards=2, replication=1)
        self.routing = routing
        self.shards: dict[str, Shard] = {}
        for info in routing.map.shards.values():
            shard = Shard.open(folder / info.id, info.id, dim=0, index_factory=ShardIndex)
            self.shards[info.id] = shard
            machine = EpochMachine(shard, 1)
            routing.local[info.id] = LocalShard(info, cast("AsyncGroup", Led()), shard, machine)
        limits = Limits()
        fan_out = FanOut(routing, self.clock, 0.5)
        self.reads = Reads(routing, fan_out, clock=self.clock, limits=limits)
        self.searches = Searches(
            routing,
            self.reads,
            clock=self.clock,
            limits=limits,
            dim=0,
            embedder=None,
            settings=SearchSection(),
        )
        self._requests = 0

    def caller(self) -> Caller:
        return Caller("t", "k", self.clock.monotonic() + 10)

    def apply(self, shard_id: str, *ops: Op) -> None:
        self._requests += 1
        request_id = self._requests.to_bytes(16, "big")
        command = encode_write(Write(request_id, b"\0" * 8, "t", NOW_MS, ops))
        shard = self.shards[shard_id]
        shard.apply([Entry(shard.applied_index + 1, 1, command)])

    def add(self, shard_id: str, content: str, number: int) -> str:
        """A memory on that shard, whoever its owner is: only the id says where it lies."""
        info = self.routing.current_map().shards[shard_id]
        key = new_id(NOW_MS, info.slot_start, RealRng())
        draft = Draft(
            content, Scope(user_id=f"u{number}"), "semantic", 0.5, [], {}, None, None, None
        )
        made_ms = NOW_MS + number
        memory = msgspec.json.encode(draft.to_memory(format_id(key), made_ms))
        self.apply(shard_id, Add(key, memory, None, made_ms, None))
        return format_id(key)

    def search(self, before_records: Callable[[], Gathered[Any] | None]) -> SearchAnswer:
        """By ranks, whose records are fetched in a round of their own."""
        ask_each = self.reads.ask_each

        async def watched(shards: Any, method: str, *rest: Any, **more: Any) -> Any:
            found = before_records() if method == "search.records" else None
            return found or await ask_each(shards, method, *rest, **more)

        self.reads.ask_each = watched  # type: ignore[method-assign]
        request = rq.SearchRequest(query="tea", fusion="rrf", top_k=10)
        return asyncio.run(self.searches.search(self.caller(), request))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for shard in made.shards.values():
        shard.close()


def test_what_is_deleted_between_the_rounds_is_left_out_of_the_results(node: Node) -> None:
    ids = [node.add("s00", "green tea", 1), node.add("s00", "tea", 2), node.add("s01", "tea", 3)]
    answer = node.search(lambda: node.apply("s00", Delete(parse_id(ids[0]), None)))
    assert {format_id(hit.id) for hit in answer.hits} == set(ids[1:])
    assert answer.partial == []


def test_a_shard_that_does_not_give_its_records_is_named(node: Node) -> None:
    kept = node.add("s00", "green tea", 1)
    node.add("s01", "black tea", 2)
    record = node.shards["s00"].get("t", parse_id(kept))
    assert record is not None
    answer = node.search(lambda: Gathered({"s00": [record.record]}))
    assert [format_id(hit.id) for hit in answer.hits] == [kept]
    assert answer.partial == ["s01"]


@pytest.mark.parametrize("fusion", ["weighted", "rrf"])
def test_long_memories_are_found_whole_without_every_shard_sending_its_own(
    node: Node, fusion: Literal["weighted", "rrf"]
) -> None:
    """Of 2 * 80 memories of 60 kB, 5 MB a shard, a page shows 90."""
    text = {}
    for number in range(160):
        content = f"tea {number} " + "x" * 60_000
        text[node.add(f"s{number % 2:02d}", content, number)] = content
    sent: list[int] = []
    candidates = node.searches._candidates_here

    def watched(*asked: Any) -> list[Any]:
        wire = candidates(*asked)
        sent.append(sum(len(row[4]) for row in wire[0]))
        return wire

    node.searches._candidates_here = watched  # type: ignore[method-assign, assignment]
    request = rq.SearchRequest(query="tea", fusion=fusion, top_k=90)
    answer = asyncio.run(node.searches.search(node.caller(), request))
    assert max(sent) <= 4 << 20
    found = [json.loads(bytes(hit.record)) for hit in answer.hits]
    assert len(found) == 90
    assert all(text[memory["id"]] == memory["content"] for memory in found)


def test_a_long_history_ends_with_the_newest_versions_that_fit_an_answer(node: Node) -> None:
    memory_id = node.add("s00", "tea", 1)
    key = parse_id(memory_id)
    for version in range(1, 101):
        stored = node.shards["s00"].get("t", key)
        assert stored is not None
        memory = msgspec.json.decode(stored.record, type=Memory)
        content = f"{version} " + "x" * 60_000
        after = msgspec.structs.replace(memory, content=content, version=version + 1)
        node.apply("s00", Update(key, version, msgspec.json.encode(after), None, None))
    answer = asyncio.run(node.reads.history(node.caller(), memory_id))
    assert 30 < len(answer.results) < 40
    assert [entry.version for entry in answer.results] == list(range(102))[-len(answer.results) :]


def test_a_leg_weighs_nothing_or_enough_to_count(node: Node) -> None:
    node.add("s00", "tea", 1)
    for weight in (5e-324, 1e-9, -1.0, 101.0, float("nan")):
        request = rq.SearchRequest(query="tea", fusion="rrf", legs={"bm25": weight})
        with pytest.raises(InvalidField, match="weight"):
            asyncio.run(node.searches.search(node.caller(), request))


def test_a_replica_that_waits_to_be_seeded_is_asked_last(node: Node) -> None:
    routing = node.routing
    behind = Led()
    behind.needs_reseed = True
    routing.local["s00"].group = cast("AsyncGroup", behind)
    routing.map = ShardMap.initial(["a", "b"], shards=2, replication=2)
    assert routing.replica_for_read("s01") == "a"
    assert routing.replica_for_read("s00") == "a"
    routing.is_connected = lambda peer: True  # type: ignore[method-assign]
    assert routing.replica_for_read("s00") == "b"
    assert routing.replica_for_read("s00", ["b"]) == "a"
    assert routing.replica_for_read("s00", ["a", "b"]) is None


@pytest.mark.parametrize("sizes", [[60_000] * 90, [5_000_000, 10, 5_000_000], [10] * 150])
def test_pages_of_long_memories_hold_each_memory_once_and_no_shard_sends_all(
    node: Node, sizes: list[int]
) -> None:
    added = []
    for number, size in enumerate(sizes):
        added.append(node.add(f"s{number % 5 // 4:02d}", "x" * size, number))
    seen: list[str] = []
    cursor = None
    while True:
        query = rq.ListQuery(limit=1000, cursor=cursor)
        page = asyncio.run(node.reads.list_page(node.caller(), query))
        seen += [json.loads(bytes(record))["id"] for record in page.results]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == added[::-1]
    body = {"tenant": "t", "scope": [None] * 4, "after": None, "limit": 1001, "now_ms": NOW_MS}
    rows, _ = asyncio.run(node.reads._list_here(node.routing.local["s00"], body, None))
    assert sum(len(record) for *_, record in rows[:-64]) <= 4 << 20
