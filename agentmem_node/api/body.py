"""Reading a request's body: bounded in bytes, in time, and together with all others."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.web_request import BaseRequest

from agentmem_cluster.errors import BadRequest, TooLarge
from agentmem_node.api.admission import Admission
from agentmem_node.model.limits import Limits


class HeldBody:
    """A body's bytes and their share of the node's bound; `release` gives that back."""

    __slots__ = ("_admission", "_held", "_route_bytes_max")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held = 0
        self._route_bytes_max: int | None = None

    def release(self) -> None:
        if self._held:
            self._admission.release_bytes(self._held)
            self._held = 0

    def _take(self, size: int, limits: Limits) -> None:
        self._check(self._held + size, limits)
        self._admission.hold_bytes(size)
        self._held += size

    def _check(self, size: int, limits: Limits) -> None:
        route_max = self._route_bytes_max
        if route_max is not None and size > route_max:
            raise TooLarge(f"The body has {size:,} bytes or more; this route takes {route_max:,}.")
        if size > limits.body_bytes_max:
            raise too_large(size, limits)

    async def read(
        self,
        request: BaseRequest,
        limits: Limits,
        within_s: float,
        route_bytes_max: int | None = None,
    ) -> bytes:
        """The whole body. Raises TooLarge, Overloaded, or BadRequest when it is cut or late.

        `route_bytes_max`: what bodies of this route have at most, if less than others.
        """
        self._route_bytes_max = route_bytes_max
        content = request.content
        if content.is_eof():  # it came with the headers: nearly always
            body = content.read_nowait()
            self._take(len(body), limits)
            return body
        announced = request.headers.get("Content-Length")
        if announced is not None:
            self._check(int(announced), limits)
        expect = request.headers.get("Expect")
        if expect is not None:
            if expect.lower() != "100-continue":
                raise BadRequest(
                    "The header Expect is not understood.", hint="Only 100-continue is."
                )
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(min(limits.body_read_ms_max / 1000, within_s)):
                while piece := await content.readany():
                    self._take(len(piece), limits)
                    pieces.append(piece)
        except web.RequestPayloadError:
            raise BadRequest("The body is not framed as its headers say.") from None
        except TimeoutError:
            raise BadRequest(
                f"The body did not arrive within {limits.body_read_ms_max} ms "
                "(limits.body_read_ms_max) and before the request's deadline.",
                hint="Send it at once, or in smaller batches.",
            ) from None
        return b"".join(pieces)


def too_large(size: int, limits: Limits) -> TooLarge:
    return TooLarge(
        f"The body has {size:,} bytes or more; the limit is {limits.body_bytes_max:,} "
        "(limits.body_bytes_max).",
        hint="Send fewer memories in one batch.",
    )
