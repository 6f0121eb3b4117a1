"""A node's HTTP API over a real socket, before a service that keeps memories in a dictionary."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
from yarl import URL

from agentmem_cluster.errors import AgentMemError, Conflict, InvalidField, NotFound
from agentmem_node.api.server import HttpServer
from agentmem_node.config import load
from agentmem_node.model import requests as rq
from agentmem_node.model.memory import HistoryEntry, Memory
from agentmem_node.model.search import Consistency, Hit, LegHit, SearchAnswer
from agentmem_node.observe.metrics import Metrics
from agentmem_node.observe.snapshot import GroupSnapshot, NodeSnapshot, ShardSnapshot
from agentmem_node.security.keys import KeyOwner, KeyTable, hash_key
from agentmem_node.service.contract import Caller
from agentmem_node.service.join_messages import (
    JoinAnswer,
    JoinRequest,
    JoinTokenKept,
    JoinTokenMade,
    JoinTokenRequest,
)
from tests.api.operations_in_memory import OperationsInMemory

KEY_ANA, KEY_BEN = "am_" + "a" * 52, "am_" + "b" * 52
AT = "2026-01-31T09:30:00.000Z"


KEPT = JoinTokenKept(id="ab" * 8, state="open", expires_at=AT, uses=2, node=None, joined=["n4"])


@dataclass
class DictionaryService(OperationsInMemory):
    """NodeService without disk, cluster or search engine. `before` runs in front of each call."""

    limits: Any = None
    node_id: str = "n1"
    url: str = "http://127.0.0.1:7700"
    keys: KeyTable = field(default_factory=lambda: KeyTable({}))
    memories: dict[tuple[str, str], Memory] = field(default_factory=dict)
    calls: list[tuple[str, Caller]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    before: Callable[[str], Awaitable[None]] | None = None
    is_ready: bool = True
    needs_key: bool = True
    _next: int = 0

    async def _called(self, name: str, caller: Caller, argument: Any = None) -> None:
        self.calls.append((name, caller))
        self.seen.append(argument)
        if self.before is not None:
            await self.before(name)

    def _find(self, caller: Caller, memory_id: str) -> Memory:
        memory = self.memories.get((caller.tenant, memory_id))
        if memory is None:
            raise NotFound(f"There is no memory {memory_id!r}.")
        return memory

    def _answer(self, memory: Memory) -> rq.MemoryAnswer:
        raw = msgspec.Raw(msgspec.json.encode(memory))
        return rq.MemoryAnswer(memory=raw, version=memory.version, token=f"s01:{self._next}")

    async def add(self, caller: Caller, items: list[rq.AddRequest | AgentMemError]) -> rq.AddAnswer:
        await self._called("add", caller, items)
        results = []
        for item in items:
            if isinstance(item, AgentMemError):
                if len(items) == 1:
                    raise item
                results.append(
                    rq.AddedItem(
                        event="ERROR", error=rq.ItemError(code=item.code, detail=item.message)
                    )
                )
                continue
            if not item.content:
                error = InvalidField("`content` is empty.", field="content")
                if len(items) == 1:
                    raise error
                results.append(
                    rq.AddedItem(
                        event="ERROR", error=rq.ItemError(code=error.code, detail=error.message)
                    )
                )
                continue
            self._next += 1
            memory = Memory(
                id=f"00000000-0000-8000-8000-{self._next:012}",
                content=item.content,
                user_id=item.user_id,
                metadata=item.metadata,
                created_at=AT,
                updated_at=AT,
            )
            self.memories[caller.tenant, memory.id] = memory
            raw = msgspec.Raw(msgspec.json.encode(memory))
            results.append(rq.AddedItem(event="ADD", id=memory.id, memory=raw))
        return rq.AddAnswer(results=results, token=f"s01:{self._next}")

    async def make_join_token(self, caller: Caller, wish: JoinTokenRequest) -> JoinTokenMade:
        await self._called("make_join_token", caller, wish)
        return JoinTokenMade(token="amj_", id="0" * 16, expires_at=AT, uses=wish.uses, node=None)

    async def join_tokens(self, caller: Caller) -> list[JoinTokenKept]:
        await self._called("join_tokens", caller, None)
        return [KEPT]

    async def revoke_join_token(self, caller: Caller, token_id: str) -> JoinTokenKept:
        await self._called("revoke_join_token", caller, token_id)
        if token_id != KEPT.id:
            raise NotFound("There is no such join token.")
        return KEPT

    async def join(self, request: JoinRequest) -> JoinAnswer:
        self.seen.append(request)
        return JoinAnswer(payload="{}", proof="0" * 64)

    async def get(
        self, caller: Caller, memory_id: str, consistency: Consistency, token: str | None
    ) -> rq.MemoryAnswer:
        await self._called("get", caller, (consistency, token))
        return self._answer(self._find(caller, memory_id))

    async def update(
        self, caller: Caller, memory_id: str, change: rq.UpdateRequest
    ) -> rq.MemoryAnswer:
        await self._called("update", caller, change)
        memory = self._find(caller, memory_id)
        self._check(memory, change.expected_version)
        if change.content is not msgspec.UNSET:
            memory = msgspec.structs.replace(memory, content=change.content)
        memory = msgspec.structs.replace(memory, version=memory.version + 1)
        self.memories[caller.tenant, memory_id] = memory
        return self._answer(memory)

    @staticmethod
    def _check(memory: Memory, expected: int | None) -> None:
        if expected is not None and expected != memory.version:
            raise Conflict("The memory changed.", current_version=memory.version)

    async def delete(
        self, caller: Caller, memory_id: str, expected_version: int | None
    ) -> rq.DeleteAnswer:
        await self._called("delete", caller, expected_version)
        self._check(self._find(caller, memory_id), expected_version)
        del self.memories[caller.tenant, memory_id]
        return rq.DeleteAnswer(
            results=[rq.DeletedItem(id=memory_id, event="DELETE")], token="s01:9"
        )

    async def delete_many(self, caller: Caller, ids: list[str]) -> rq.DeleteAnswer:
        await self._called("delete_many", caller, ids)
        results = []
        for memory_id in ids:
            if self.memories.pop((caller.tenant, memory_id), None) is None:
                error = rq.ItemError(code="not_found", detail="There is no such memory.")
                results.append(rq.DeletedItem(id=memory_id, event="ERROR", error=error))
            else:
                results.append(rq.DeletedItem(id=memory_id, event="DELETE"))
        return rq.DeleteAnswer(results=results, token="s01:9")

    async def list(self, caller: Caller, query: rq.ListQuery) -> rq.ListAnswer:
        await self._called("list", caller, query)
        found = [m for (tenant, _), m in self.memories.items() if tenant == caller.tenant]
        page = found[: query.limit]
        return rq.ListAnswer(
            results=[msgspec.Raw(msgspec.json.encode(memory)) for memory in page],
            next_cursor="more" if len(found) > len(page) else None,
            partial=[],
            token="s01:9",
        )

    async def history(self, caller: Caller, memory_id: str) -> rq.HistoryAnswer:
        await self._called("history", caller)
        memory = self._find(caller, memory_id)
        entry = HistoryEntry(
            memory_id=memory_id, event="ADD", version=1, new_content=memory.content, at=AT
        )
        return rq.HistoryAnswer(results=[entry], token="s01:9")

    async def search(self, caller: Caller, request: rq.SearchRequest) -> SearchAnswer:
        await self._called("search", caller, request)
        words = (request.query or "").lower().split()
        hits = []
        for (tenant, memory_id), memory in self.memories.items():
            found = sum(word in memory.content.lower() for word in words)
            if tenant == caller.tenant and (found or not words):
                score = found / max(1, len(words))
                hit = Hit(memory_id.encode(), score, msgspec.json.encode(memory))
                if request.explain:
                    hit.legs = {"bm25": LegHit(rank=1, score=2.5, weight=1.0, contribution=score)}
                hits.append(hit)
        hits.sort(key=lambda hit: (-hit.score, hit.id))
        return SearchAnswer(hits[: request.top_k], partial=[], tokens={"s01": 7}, took_ms=0.25)

    def encode_cursor(self, request: rq.SearchRequest, answer: SearchAnswer) -> str | None:
        return "cursor" if len(answer.hits) == request.top_k else None

    def cluster_view(self) -> dict[str, Any]:
        return {
            "version": 1,
            "nodes": {"n1": {"http": self.url, "state": "draining", "zone": "rack 7"}},
            "shards": {"s01": {"epoch": 1, "members": ["n1"], "leader": "n1", "slots": [[0, 99]]}},
        }

    def owner_of_key(self, key_hash: bytes) -> KeyOwner | None:
        return self.keys.find(key_hash)

    def keys_required(self) -> bool:
        return self.needs_key and len(self.keys) > 0

    def has_keys(self) -> bool:
        return len(self.keys) > 0

    def ready(self) -> tuple[bool, dict[str, Any]]:
        return self.is_ready, {} if self.is_ready else {"s01": "no leader"}

    def metrics_snapshot(self) -> NodeSnapshot:
        group = GroupSnapshot("s01", "leader", 3, True, 118, 117, 118)
        shard = ShardSnapshot("s01", memories=len(self.memories), record_bytes=4096)
        return NodeSnapshot("n1", "0.1.0", groups=[group], shards=[shard])


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Node:
    """What a test sees: the service behind, the port, and a way to ask."""

    service: DictionaryService
    server: HttpServer
    address: str
    session: aiohttp.ClientSession

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """`body`: JSON, or bytes as they are."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        url = f"http://{self.address}{path}"
        async with self.session.request(
            method, URL(url, encoded=True), data=body, headers=headers, allow_redirects=False
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.ask("POST", f"/api/v1{path}", body, named)

    async def get(self, path: str, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.ask("GET", f"/api/v1{path}", None, named)

    async def add(self, content: str = "Ana drinks tea.", **fields: Any) -> str:
        answer = await self.post("/memories", {"content": content, "user_id": "ana", **fields})
        assert answer.status == 201, answer.body
        return str(answer.json["results"][0]["id"])

    async def raw(self, data: bytes, *, whole: bool = True) -> bytes:
        """What comes back for bytes on a fresh connection: all until it closes, or one answer."""
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await writer.drain()
        try:
            async with asyncio.timeout(10):
                if whole:
                    return await reader.read()
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                return head + await reader.readexactly(size)
        finally:
            writer.close()


Scenario = Callable[[Node], Awaitable[None]]


@pytest.fixture
def run() -> Callable[..., None]:
    """`run(scenario, keys={key: tenant}, admins={key}, ...)`: a node for one scenario."""

    def run(
        scenario: Scenario,
        *,
        keys: dict[str, str] | None = None,
        admins: frozenset[str] = frozenset(),
        **settings: Any,
    ) -> None:
        async def main() -> None:
            overrides = {name.replace("__", "."): value for name, value in settings.items()}
            config = load(
                environment={}, overrides={"node.listen": "127.0.0.1:0", **overrides}
            ).config
            service = DictionaryService(limits=config.limits)
            if keys:
                service.keys = KeyTable(
                    {
                        hash_key(key): KeyOwner(tenant, tenant[:4], key in admins)
                        for key, tenant in keys.items()
                    }
                )
            server = HttpServer(service, config, metrics=Metrics(service.metrics_snapshot))
            address = await server.start()
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                try:
                    await asyncio.wait_for(
                        scenario(Node(service, server, address, session)), timeout=15
                    )
                finally:
                    await server.stop(grace_s=2)

        uvloop.run(main())  # the loop that nodes run on

    return run
