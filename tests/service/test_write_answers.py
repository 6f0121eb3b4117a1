"""What a write answers when others write at the same moment, and when parts of it fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    DeadlineExceeded,
    DiskFull,
    NotFound,
    Overloaded,
)
from agentmem_cluster.raft.api import Applied, Entry
from agentmem_cluster.raft.host import AsyncGroup
from agentmem_cluster.realtime import RealRng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.engine.shard import Shard
from agentmem_node.model import requests as rq
from agentmem_node.model.commands import Delete, Write, encode_write
from agentmem_node.model.ids import parse_id
from agentmem_node.model.limits import Limits
from agentmem_node.service.contract import Caller
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.write import Writes

NOW_MS = 1_770_000_000_000
ANA = {"content": "Ana drinks tea.", "user_id": "ana"}


class Clock:
    now_ms = NOW_MS

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def wall_ms(self) -> int:
        return self.now_ms


class Group:
    """A group of one that commits at once. `after`: what others have applied before we look."""

    is_leader = True
    leader = "a"
    needs_reseed = False

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.after: Callable[[], None] = lambda: None
        self.refusal: AgentMemError | None = None

    def commit(self, command: bytes) -> Applied:
        index = self.shard.applied_index + 1
        (result,) = self.shard.apply([Entry(index, 1, command)])
        return Applied(index, 1, result)

    async def read_index(self, *, deadline: float) -> int:
        return self.shard.applied_index

    async def propose(self, command: bytes, *, deadline: float) -> Applied:
        if self.refusal is not None:
            raise self.refusal
        applied = self.commit(command)
        self.after()
        return applied


class Node:
    def __init__(self, folder: Path, shards: int) -> None:
        self.clock = Clock()
        self.routing = Routing("a", None, self.clock)
        self.routing.map = ShardMap.initial(["a"], shards=shards, replication=1)
        self.groups: list[Group] = []
        self.disk_is_full = False
        for info in self.routing.map.shards.values():
            shard = Shard.open(folder / info.id, info.id, dim=0)
            group = Group(shard)
            self.groups.append(group)
            local = LocalShard(info, cast("AsyncGroup", group), shard, EpochMachine(shard, 1))
            self.routing.local[info.id] = local
        self.writes = Writes(
            self.routing,
            clock=self.clock,
            rng=RealRng(),
            limits=Limits(),
            dim=0,
            embedder=None,
            is_disk_full=lambda: self.disk_is_full,
        )

    def caller(self, request_id: bytes | None = None) -> Caller:
        return Caller("t", "k", self.clock.monotonic() + 5, request_id, b"\0" * 8)

    def run(self, work: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await work

        return asyncio.run(wait())

    def add(self, **more: Any) -> str:
        item = rq.AddRequest(**(ANA | more))
        memory_id: str = self.run(self.writes.add(self.caller(), [item])).results[0].id
        return memory_id

    def update(self, memory_id: str, request_id: bytes | None = None, **change: Any) -> Any:
        request = rq.UpdateRequest(**change)
        return self.run(self.writes.update(self.caller(request_id), memory_id, request))

    def delete_of(self, memory_id: str) -> bytes:
        ops = (Delete(parse_id(memory_id), None),)
        return encode_write(Write(b"\7" * 16, b"\0" * 8, "t", NOW_MS, ops))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, shards=1)
    yield made
    for group in made.groups:
        group.shard.close()


def test_an_update_that_was_done_answers_so_although_the_memory_is_deleted_right_after(
    node: Node,
) -> None:
    memory_id = node.add()
    group = node.groups[0]
    group.after = lambda: [group.commit(node.delete_of(memory_id))].clear()
    answer = node.update(memory_id, content="Ana drinks coffee.")
    assert answer.version == 2
    assert json.loads(bytes(answer.memory))["content"] == "Ana drinks coffee."


def test_an_update_answers_what_it_made_and_not_what_others_made_of_that(node: Node) -> None:
    memory_id = node.add()
    group = node.groups[0]

    def another() -> None:
        group.after = lambda: None

        async def run() -> None:
            change = rq.UpdateRequest(content="Ana drinks water.")
            await node.writes.update(node.caller(), memory_id, change)

        # Nothing in it waits for anything: one step is all of it.
        with pytest.raises(StopIteration):
            run().send(None)

    group.after = another
    answer = node.update(memory_id, content="Ana drinks coffee.")
    assert answer.version == 2
    assert json.loads(bytes(answer.memory))["content"] == "Ana drinks coffee."


def test_an_expired_memory_is_not_found_by_an_update_either(node: Node) -> None:
    memory_id = node.add(expires_at="2026-02-02T02:40:01Z")
    node.update(memory_id, importance=0.25)
    node.clock.now_ms += 60_000
    with pytest.raises(NotFound):
        node.update(memory_id, expires_at=None)


def test_an_update_that_lets_a_memory_expire_can_be_sent_again(node: Node) -> None:
    memory_id = node.add()
    first = node.update(memory_id, b"r" * 16, expires_at="2020-01-01")
    again = node.update(memory_id, b"r" * 16, expires_at="2020-01-01")
    assert (again.version, bytes(again.memory)) == (2, bytes(first.memory))


@pytest.mark.parametrize("order", [1, -1])
def test_parts_that_all_failed_are_told_as_unknown_when_one_of_them_is(
    tmp_path: Path, order: int
) -> None:
    node = Node(tmp_path, shards=2)
    errors: list[AgentMemError] = [Overloaded("full"), DeadlineExceeded("may or may not")]
    for group, error in zip(node.groups, errors[::order], strict=True):
        group.refusal = error
    items = [rq.AddRequest(content="tea", user_id=f"u{number}") for number in range(20)]
    with pytest.raises(DeadlineExceeded):
        node.run(node.writes.add(node.caller(), items))
    for group in node.groups:
        group.shard.close()


def test_a_full_disk_refuses_deletes_too_wherever_they_come_from(node: Node) -> None:
    memory_id = node.add()
    node.disk_is_full = True
    with pytest.raises(DiskFull):
        node.run(node.writes.delete(node.caller(), memory_id, None))
    with pytest.raises(DiskFull):
        node.run(node.writes.delete_many(node.caller(), [memory_id]))
    body = {"shard": "s00", "epoch": 1, "tenant": "t", "left_ms": 1_000}
    with pytest.raises(DiskFull):
        node.run(node.writes.on_propose("b", body | {"command": node.delete_of(memory_id)}))


@pytest.mark.parametrize("command", [b"", "text", 7, None, [b"x"]], ids=repr)
def test_a_command_of_a_peer_that_is_not_bytes_never_reaches_the_journal(
    node: Node, command: object
) -> None:
    body = {"shard": "s00", "epoch": 1, "tenant": "t", "left_ms": 1_000, "command": command}
    with pytest.raises(BadRequest):
        node.run(node.writes.on_propose("b", body))
    assert node.groups[0].shard.applied_index == 0
