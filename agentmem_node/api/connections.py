"""Connections: as many as are allowed, and JSON answers even to what is not HTTP."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from aiohttp import web
from aiohttp.web_request import BaseRequest

from agentmem_cluster.errors import BadRequest, InternalError
from agentmem_node.api.reply import error_reply

# A request's headers must arrive within this time after the answer before it, or after the
# connection was opened; longer than the idle time of usual clients and proxies (15 to 60 s).
KEEP_ALIVE_S = 75.0
# How long the rest of a refused body is read, so that its sender gets to see the answer.
_LINGER_S = 2.0
# A filter may stand in a URL, a token of a thousand shards in a header.
_LINE_BYTES_MAX = 32 * 1024
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)
_REFUSAL_BODY = (
    b'{"detail":"This node has as many connections as it may (limits.connections_max).",'
    b'"error":"This node has as many connections as it may (limits.connections_max).",'
    b'"code":"unavailable"}'
)


class Connection(web.RequestHandler):
    """aiohttp's protocol; its own error answers are plain text and a traceback in the log."""

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # the client left: nobody's fault, and nobody to answer
        if request.writer.output_size > 0:
            raise ConnectionError("A part of the answer was sent already.")
        if status == 400:
            reason = str(message or exc or "").strip().splitlines()
            text = reason[0].rstrip(":.")[:200] if reason else "malformed"
            return error_reply(BadRequest(f"This is not a valid HTTP request: {text}."), close=True)
        self.logger.error("An HTTP request failed.", exc_info=exc)
        return error_reply(InternalError("Something went wrong in this node."), close=True)


class Connections(web.Server):
    """All open connections; over `connections_max` a new one is told so and closed."""

    def __init__(self, handler: Any, *, connections_max: int) -> None:
        super().__init__(handler)
        self._connections_max = connections_max
        self.open = 0
        self.refused = 0

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.open += 1
        super().connection_made(handler, transport)

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        self.open -= 1
        super().connection_lost(handler, exc)

    def accept(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection."""
        if self.open >= self._connections_max:
            self.refused += 1
            return _Refused()
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=_LINGER_S,
            access_log=None,  # type: ignore[arg-type]  # as its own runner does
            max_line_size=_LINE_BYTES_MAX,
            max_field_size=_LINE_BYTES_MAX,
            # A few hundred bytes can unpack to gigabytes: packed bodies are refused instead.
            auto_decompress=False,
        )


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writable = cast("asyncio.WriteTransport", transport)
        writable.write(_REFUSAL % (len(_REFUSAL_BODY), _REFUSAL_BODY))
        writable.close()
