"""A small AgentMem in memory behind real sockets: what both drivers are tested against."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from agentmem_cluster.ring import SLOTS, slot_of
from agentmem_node.model.ids import format_id, new_id


class CountingRng:
    def __init__(self) -> None:
        self.drawn = 0

    def random(self) -> float:
        return 0.5

    def token(self, size_bytes: int) -> bytes:
        self.drawn += 1
        return self.drawn.to_bytes(size_bytes, "big")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NODES = ("n1", "n2", "n3")
SHARDS = 4


@dataclass
class FakeCluster:
    """Three nodes that share one dictionary. `refuse` may answer a request before they do."""

    urls: dict[str, str] = field(default_factory=dict)
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)  # of /health/ready, by node
    seen: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    refuse: Callable[[str, web.Request], web.Response | None] = lambda _node, _request: None
    version: int = 1
    page_size: int = 3
    rng: CountingRng = field(default_factory=CountingRng)

    def shard_of(self, owner: str) -> str:
        return f"s{slot_of('default', owner) * SHARDS // SLOTS:02d}"

    def view(self) -> dict[str, Any]:
        width = SLOTS // SHARDS
        return {
            "version": self.version,
            "tenant": "default",
            "nodes": {name: {"http": url} for name, url in self.urls.items()},
            "shards": {
                f"s{i:02d}": {
                    "epoch": 1,
                    "members": list(NODES),
                    "leader": self.leaders[f"s{i:02d}"],
                    "slots": [[i * width, (i + 1) * width]],
                }
                for i in range(SHARDS)
            },
        }

    def asked(self, path_end: str) -> list[str]:
        """The nodes that got a request for such a path, in order."""
        return [node for node, _method, path, _headers in self.seen if path.endswith(path_end)]

    def store(self, fields: dict[str, Any]) -> dict[str, Any]:
        if not fields.get("content"):
            error = {"code": "invalid_field", "detail": "`content` is empty."}
            return {"event": "ERROR", "error": error}
        slot = slot_of("default", f"user:{fields.get('user_id')}")
        memory_id = format_id(new_id(1_780_000_000_000 + len(self.memories), slot, self.rng))
        memory = {"id": memory_id, "version": 1, "created_at": "2026-05-28T00:00:00.000Z", **fields}
        self.memories[memory_id] = memory
        return {"event": "ADD", "id": memory_id, "memory": memory}

    def app(self, node: str) -> web.Application:
        @web.middleware
        async def every(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.seen.append((node, request.method, request.path, dict(request.headers)))
            refusal = self.refuse(node, request)
            if refusal is not None:
                return refusal
            key = request.headers.get("Idempotency-Key")
            if key is not None and key in self.ledger:
                return web.json_response(self.ledger[key])
            answer = await handler(request)
            if key is not None and answer.status == 200:
                assert isinstance(answer, web.Response) and isinstance(answer.body, bytes)
                self.ledger[key] = json.loads(answer.body)
            return answer

        async def cluster(_request: web.Request) -> web.Response:
            return web.json_response(self.view())

        async def ready(_request: web.Request) -> web.Response:
            said = {"ready": node == "n1", "reasons": self.reasons.get(node, {})}
            return web.json_response(said, status=200 if node == "n1" else 503)

        async def add(request: web.Request) -> web.Response:
            item = self.store(await request.json())
            if item["event"] == "ERROR":
                return web.json_response(item["error"], status=400)
            return web.json_response({"results": [item], "token": "s00:1"})

        async def add_batch(request: web.Request) -> web.Response:
            items = [self.store(fields) for fields in (await request.json())["memories"]]
            return web.json_response({"results": items, "token": f"s00:{len(self.memories)}"})

        def missing() -> web.Response:
            return web.json_response({"code": "not_found", "detail": "No such memory."}, status=404)

        async def get(request: web.Request) -> web.Response:
            memory = self.memories.get(request.match_info["id"])
            return missing() if memory is None else web.json_response(memory)

        async def update(request: web.Request) -> web.Response:
            memory = self.memories.get(request.match_info["id"])
            if memory is None:
                return missing()
            changes = await request.json()
            expected = changes.pop("expected_version", None)
            if expected is not None and expected != memory["version"]:
                return web.json_response({"code": "conflict", "detail": "It moved."}, status=409)
            memory |= {**changes, "version": memory["version"] + 1}
            return web.json_response({"memory": memory, "version": memory["version"], "token": ""})

        async def delete(request: web.Request) -> web.Response:
            if self.memories.pop(request.match_info["id"], None) is None:
                return missing()
            return web.json_response(
                {"results": [{"id": request.match_info["id"], "event": "DELETE"}], "token": "s00:9"}
            )

        async def delete_batch(request: web.Request) -> web.Response:
            results: list[dict[str, Any]] = []
            for memory_id in (await request.json())["ids"]:
                if self.memories.pop(memory_id, None) is None:
                    error = {"code": "not_found", "detail": "No such memory."}
                    results.append({"id": memory_id, "event": "ERROR", "error": error})
                else:
                    results.append({"id": memory_id, "event": "DELETE"})
            return web.json_response({"results": results, "token": "s00:9"})

        async def listing(request: web.Request) -> web.Response:
            found = [
                m
                for m in sorted(self.memories.values(), key=lambda m: str(m["id"]), reverse=True)
                if request.query.get("user_id") in (None, m.get("user_id"))
            ]
            start = int(request.query.get("cursor", "0"))
            end = start + self.page_size
            after = str(end) if end < len(found) else None
            return web.json_response(
                {"results": found[start:end], "next_cursor": after, "partial": [], "token": ""}
            )

        def found_by(query: dict[str, Any]) -> dict[str, Any]:
            hits = [
                {**m, "score": 0.5}
                for m in self.memories.values()
                if query["query"] in m["content"] and query.get("user_id") in (None, m["user_id"])
            ]
            return {"results": hits, "partial": [], "token": "", "took_ms": 0.1}

        async def search(request: web.Request) -> web.Response:
            return web.json_response(found_by(await request.json()))

        async def search_batch(request: web.Request) -> web.Response:
            searches = (await request.json())["searches"]
            return web.json_response({"results": [found_by(one) for one in searches]})

        async def history(request: web.Request) -> web.Response:
            memory_id = request.match_info["id"]
            entry = {"memory_id": memory_id, "event": "ADD", "version": 1, "at": "2026"}
            return web.json_response({"results": [entry], "token": ""})

        app = web.Application(middlewares=[every])
        base = "/api/v1/memories"
        app.add_routes(
            [
                web.get("/api/v1/cluster", cluster),
                web.get("/health/ready", ready),
                web.post(base, add),
                web.get(base, listing),
                web.post(f"{base}/batch", add_batch),
                web.post(f"{base}/batch/delete", delete_batch),
                web.post(f"{base}/search", search),
                web.post(f"{base}/search/batch", search_batch),
                web.get(base + "/{id}/history", history),
                web.get(base + "/{id}", get),
                web.patch(base + "/{id}", update),
                web.delete(base + "/{id}", delete),
            ]
        )
        return app


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    """Three fake nodes on loopback, in a thread of their own."""
    cluster = FakeCluster()
    for i in range(SHARDS):
        cluster.leaders[f"s{i:02d}"] = NODES[i % len(NODES)]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> list[web.AppRunner]:
        runners = []
        for node in NODES:
            runner = web.AppRunner(cluster.app(node))
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            cluster.urls[node] = f"http://127.0.0.1:{runner.addresses[0][1]}"
            runners.append(runner)
        return runners

    async def stop(runners: list[web.AppRunner]) -> None:
        for runner in runners:
            await runner.cleanup()

    runners = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    try:
        yield cluster
    finally:
        asyncio.run_coroutine_threadsafe(stop(runners), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()
