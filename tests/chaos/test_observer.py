"""The observer of a run, beside nodes that come while it asks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

from aiohttp import web
from aiohttp.test_utils import TestServer

from agentmem_chaos.hosts.base import Hosts
from agentmem_chaos.runs.observer import Observer

DEADLINE_S = 10.0


class Growing:
    """Hosts of which a further node has joined by the time that the first answers."""

    def __init__(self) -> None:
        self.nodes = ("n1",)
        self.api_key = "key"
        app = web.Application()
        app.router.add_get("/{node}/api/v1/cluster", self._answer)
        self.server = TestServer(app)

    def url(self, node: str) -> str:
        return str(self.server.make_url(f"/{node}"))

    async def _answer(self, request: web.Request) -> web.Response:
        self.nodes = ("n1", "n2")
        leading = {"term": 1, "leader": request.match_info["node"], "members": ["n1", "n2"]}
        return web.json_response({"shards": {"s00": leading}})


def test_a_node_that_joins_while_the_others_answer_is_asked_from_then_on() -> None:
    async def observed() -> Observer:
        hosts = Growing()
        async with hosts.server, asyncio.timeout(DEADLINE_S):
            observer = Observer(cast("Hosts", hosts), lambda: 0.0)
            observing = asyncio.create_task(observer.run())
            while not observing.done() and len(observer.views) < 2:
                await asyncio.sleep(0.01)
            observing.cancel()
            with suppress(asyncio.CancelledError):
                await observing
        return observer

    observer = asyncio.run(observed())
    assert set(observer.views) == {"n1", "n2"}
    assert observer.leaders() == {"s00": "n2"}
