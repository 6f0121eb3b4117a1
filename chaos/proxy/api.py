"""Toxiproxy's HTTP API over a table of proxies."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from agentmem_chaos.proxy.errors import ApiError, bad_body, missing, no_proxy, proxy_exists
from agentmem_chaos.proxy.proxy import Proxy

VERSION = "2.9.0"  # of the API that is spoken
BODY_BYTES_MAX = 1 << 20


class Api:
    """The proxies by name, and the application that serves them."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.proxies: dict[str, Proxy] = {}
        self._chance = chance or random.Random()
        self.app = web.Application(middlewares=[_errors], client_max_size=BODY_BYTES_MAX)
        self.app.add_routes(
            [
                web.get("/version", self._version),
                web.post("/reset", self._reset),
                web.post("/populate", self._populate),
                web.get("/proxies", self._list),
                web.post("/proxies", self._create),
                web.get("/proxies/{proxy}", self._show),
                web.post("/proxies/{proxy}", self._update),
                web.patch("/proxies/{proxy}", self._update),
                web.delete("/proxies/{proxy}", self._delete),
                web.get("/proxies/{proxy}/toxics", self._toxics),
                web.post("/proxies/{proxy}/toxics", self._add_toxic),
                web.get("/proxies/{proxy}/toxics/{toxic}", self._toxic),
                web.post("/proxies/{proxy}/toxics/{toxic}", self._change_toxic),
                web.patch("/proxies/{proxy}/toxics/{toxic}", self._change_toxic),
                web.delete("/proxies/{proxy}/toxics/{toxic}", self._remove_toxic),
            ]
        )
        self.app.on_shutdown.append(self._shutdown)

    async def _shutdown(self, _app: web.Application) -> None:
        for proxy in self.proxies.values():
            await proxy.stop()

    def _proxy(self, request: web.Request) -> Proxy:
        try:
            return self.proxies[request.match_info["proxy"]]
        except KeyError:
            raise no_proxy() from None

    # -- the server -----------------------------------------------------------------------

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _reset(self, _request: web.Request) -> web.Response:
        for proxy in self.proxies.values():
            await proxy.clear_toxics()
            await proxy.start()
        return web.Response(status=204)

    async def _populate(self, request: web.Request) -> web.Response:
        given = await _body(request, list)
        for entry in given:
            _named(entry)
        for entry in given:
            there = self.proxies.get(entry["name"])
            if there is not None:
                if (there.listen, there.upstream) == (entry.get("listen"), entry["upstream"]):
                    await _set_enabled(there, entry.get("enabled", True))
                    continue
                await there.stop()
                del self.proxies[there.name]
            await self._add(entry)
        names = [entry["name"] for entry in given]
        shown = [self.proxies[name].as_json() for name in names]
        return web.json_response({"proxies": shown}, status=201)

    # -- proxies --------------------------------------------------------------------------

    async def _list(self, _request: web.Request) -> web.Response:
        return web.json_response({name: p.as_json() for name, p in self.proxies.items()})

    async def _create(self, request: web.Request) -> web.Response:
        entry = await _body(request, dict)
        _named(entry)
        if entry["name"] in self.proxies:
            raise proxy_exists()
        proxy = await self._add(entry)
        return web.json_response(proxy.as_json(), status=201)

    async def _add(self, entry: dict[str, Any]) -> Proxy:
        listen = str(entry.get("listen") or "127.0.0.1:0")
        proxy = Proxy(entry["name"], listen, entry["upstream"], self._chance)
        if entry.get("enabled", True):
            await proxy.start()
        self.proxies[proxy.name] = proxy
        return proxy

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._proxy(request).as_json())

    async def _update(self, request: web.Request) -> web.Response:
        proxy = self._proxy(request)
        body = await _body(request, dict)
        listen = body.get("listen") or proxy.listen
        upstream = body.get("upstream") or proxy.upstream
        wanted = body.get("enabled", proxy.enabled)
        if (listen, upstream) != (proxy.listen, proxy.upstream):
            await proxy.stop()
            proxy.listen, proxy.upstream = str(listen), str(upstream)
        await _set_enabled(proxy, bool(wanted))
        return web.json_response(proxy.as_json())

    async def _delete(self, request: web.Request) -> web.Response:
        proxy = self._proxy(request)
        await proxy.stop()
        del self.proxies[proxy.name]
        return web.Response(status=204)

    # -- toxics ---------------------------------------------------------------------------

    async def _toxics(self, request: web.Request) -> web.Response:
        return web.json_response([t.as_json() for t in self._proxy(request).toxics.values()])

    async def _add_toxic(self, request: web.Request) -> web.Response:
        proxy = self._proxy(request)
        toxic = await proxy.add_toxic(await _body(request, dict))
        return web.json_response(toxic.as_json())

    async def _toxic(self, request: web.Request) -> web.Response:
        toxic = self._proxy(request).toxic(request.match_info["toxic"])
        return web.json_response(toxic.as_json())

    async def _change_toxic(self, request: web.Request) -> web.Response:
        proxy = self._proxy(request)
        name = request.match_info["toxic"]
        toxic = await proxy.change_toxic(name, await _body(request, dict))
        return web.json_response(toxic.as_json())

    async def _remove_toxic(self, request: web.Request) -> web.Response:
        await self._proxy(request).remove_toxic(request.match_info["toxic"])
        return web.Response(status=204)


async def _set_enabled(proxy: Proxy, wanted: bool) -> None:
    await (proxy.start() if wanted else proxy.stop())


def _named(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise bad_body("an object is expected")
    for field in ("name", "upstream"):
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise missing(field)


async def _body(request: web.Request, kind: type) -> Any:
    try:
        body = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise bad_body(str(error)) from None
    if not isinstance(body, kind):
        raise bad_body(f"{'a list' if kind is list else 'an object'} is expected")
    return body


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        document = {"error": error.message, "status": error.status}
        return web.json_response(document, status=error.status)
