"""Answers on the wire.

`Reply` writes the status line, headers and body as one piece of bytes. aiohttp's own response
builds and merges a header dictionary for each answer: of a search's 72 us in HTTP that took
25 (measured), most of it to arrive at the same eight lines.
"""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from agentmem_cluster.errors import AgentMemError

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.web_request import BaseRequest

JSON = b"application/json"
encode = msgspec.json.Encoder().encode
_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}


# An answer whose client does not read it is held in memory: so much, and so long.
_UNSENT_BYTES_MAX = 64 * 1024
_UNSENT_S_MAX = 30.0
# Usual clients refuse header lines over 8 KiB; a token of very many shards is in the body only.
_TOKEN_CHARACTERS_MAX = 4096


class _Date:
    """The Date header's line, made once a second."""

    second = 0
    line = b""


def _date_line() -> bytes:
    now = int(time.time())
    if now != _Date.second:
        _Date.second = now
        _Date.line = b"Date: %b\r\n" % formatdate(now, usegmt=True).encode()
    return _Date.line


async def _drain(writer: AbstractStreamWriter, transport: asyncio.Transport) -> None:
    """Wait until the client has read. Raises ConnectionError when it does not."""
    try:
        async with asyncio.timeout(_UNSENT_S_MAX):
            await writer.drain()
    except TimeoutError:
        transport.abort()
        raise ConnectionResetError("The client does not read its answer.") from None


class Reply(web.StreamResponse):
    """One whole answer. `headers_raw`: further header lines, each ended by CR LF."""

    # The base's __init__ is not called: none of what it sets up is used here.
    def __init__(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = JSON,
        headers_raw: bytes = b"",
        close: bool = False,
    ) -> None:
        self.code = status
        self.content = body
        self.content_type_raw = content_type
        self.headers_raw = headers_raw
        self.close = close
        self.request_id = b""
        self._stays_open = False

    @property
    def keep_alive(self) -> bool:
        return self._stays_open

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write everything; wait only if the client reads slower than we answer."""
        body = self.content
        stays_open = request.keep_alive and not self.close
        self._stays_open = stays_open
        extra = self.headers_raw
        if not stays_open:
            extra += b"Connection: close\r\n"
        elif request.version.minor == 0:
            extra += b"Connection: keep-alive\r\n"
        if self.code not in (204, 304):
            extra += b"Content-Type: %b\r\nContent-Length: %d\r\n" % (
                self.content_type_raw,
                len(body),
            )
        if self.request_id:
            extra += b"X-Request-Id: %b\r\n" % self.request_id
        head = b"%b%bServer: agentmem\r\nX-Content-Type-Options: nosniff\r\n%b\r\n" % (
            _LINES[self.code],
            _date_line(),
            extra,
        )
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("The client left.")
        transport.write(head if request.method == "HEAD" else head + body)
        if transport.get_write_buffer_size() > _UNSENT_BYTES_MAX:
            await _drain(request.writer, transport)
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def json_reply(value: Any, status: int = 200, headers_raw: bytes = b"") -> Reply:
    return Reply(status, encode(value), headers_raw=headers_raw)


def token_line(token: str) -> bytes:
    """The header that names the shards and positions an answer stands for."""
    if len(token) > _TOKEN_CHARACTERS_MAX:
        return b""
    return b"X-AgentMem-Token: %b\r\n" % token.encode("ascii", "replace")


def error_reply(error: AgentMemError, *, close: bool = False) -> Reply:
    """`{"detail", "error", "code", "details"}`, with Retry-After where a retry helps."""
    headers = b""
    if error.retry_after_s is not None:
        # Whole seconds, as HTTP has it; under one second it says 0: retry at once.
        seconds = int(error.retry_after_s + 0.999) if error.retry_after_s >= 1 else 0
        headers += b"Retry-After: %d\r\n" % seconds
    if error.status == 401:
        headers += b'WWW-Authenticate: Bearer realm="agentmem"\r\n'
    return Reply(error.status, encode(error.as_dict()), headers_raw=headers, close=close)
