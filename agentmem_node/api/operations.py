"""Handlers for people who run a node: cluster, health, metrics, the API's own description."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from agentmem_node.api.context import Api
from agentmem_node.api.exchange import Exchange
from agentmem_node.api.reply import Reply, json_reply
from agentmem_node.api.shapes import Liveness, Readiness

# Nothing but this page itself may run or be shown in it, and it may talk to this node only.
_PAGE_LINES = (
    b"Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; "
    b"connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'\r\n"
    b"Referrer-Policy: no-referrer\r\nCache-Control: no-cache\r\n"
)


async def cluster(api: Api, exchange: Exchange, query: object) -> Reply:
    return json_reply({**api.service.cluster_view(), "tenant": exchange.caller.tenant})


async def live(api: Api, exchange: Exchange, query: object) -> Reply:
    return json_reply(Liveness())


async def ready(api: Api, exchange: Exchange, query: object) -> Reply:
    is_ready, reasons = api.service.ready()
    if api.is_draining:
        return json_reply(Readiness(status="shutting_down", reasons=reasons), 503)
    if not is_ready:
        return json_reply(
            Readiness(status="not_ready", reasons=reasons), 503, b"Retry-After: 1\r\n"
        )
    return json_reply(Readiness(status="ready", reasons=reasons))


async def metrics(api: Api, exchange: Exchange, query: object) -> Reply:
    content_type, body = api.metrics.exposition(exchange.caller.tenant)
    return Reply(200, body, content_type=content_type.encode())


async def openapi(api: Api, exchange: Exchange, query: object) -> Reply:
    return Reply(200, api.document, headers_raw=b"Cache-Control: no-cache\r\n")


@cache
def _asset(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


async def docs(api: Api, exchange: Exchange, query: object) -> Reply:
    return Reply(
        200,
        _asset("docs.html"),
        content_type=b"text/html; charset=utf-8",
        headers_raw=_PAGE_LINES,
    )


async def docs_script(api: Api, exchange: Exchange, query: object) -> Reply:
    return Reply(
        200,
        _asset("docs.js"),
        content_type=b"text/javascript; charset=utf-8",
        headers_raw=_PAGE_LINES,
    )


async def docs_style(api: Api, exchange: Exchange, query: object) -> Reply:
    return Reply(
        200,
        _asset("docs.css"),
        content_type=b"text/css; charset=utf-8",
        headers_raw=_PAGE_LINES,
    )
