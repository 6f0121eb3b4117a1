"""The HTTP server of a node: every request goes through `HttpServer._answer`, once.

It stands on aiohttp's low-level server with a dispatch of its own: 30 us of processor time for
a small request, of which an `aiohttp.web.Application` needs 72 (measured on one core).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from aiohttp.web_request import BaseRequest

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    DeadlineExceeded,
    InternalError,
    ShuttingDown,
)
from agentmem_node.api.body import HeldBody
from agentmem_node.api.connections import Connections
from agentmem_node.api.context import Api
from agentmem_node.api.deadlines import Deadlines
from agentmem_node.api.exchange import Exchange, deadline_s, request_id_of, write_identity
from agentmem_node.api.openapi import document_json
from agentmem_node.api.reply import Reply, error_reply
from agentmem_node.api.routes import ROUTES, Route
from agentmem_node.api.routing import MethodNotAllowed, Router
from agentmem_node.config_keys import Config, split_address
from agentmem_node.observe.access_log import AccessLog
from agentmem_node.observe.metrics import InFlight, Metrics
from agentmem_node.security.authenticate import ANONYMOUS, KeyAuthenticator, Principal
from agentmem_node.security.browsers import BrowserFence
from agentmem_node.service.contract import Caller, NodeService

_log = logging.getLogger("agentmem.http")
_BACKLOG = 1024
_UNROUTED = "(none)"


class HttpServer:
    """`await start()`, then `await stop()`. `clock` is the clock of the service's deadlines."""

    def __init__(
        self,
        service: NodeService,
        config: Config,
        *,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = Api(service, config, metrics, clock, document_json())
        self._router = Router(ROUTES)
        self._authenticator = KeyAuthenticator(
            service.owner_of_key, service.keys_required, service.has_keys
        )
        self._fence = BrowserFence(keyless=not service.keys_required())
        self._deadlines = Deadlines(clock)
        self._access_log = AccessLog() if config.node.access_log else None
        # Ids of requests that bring none: unique over restarts, for a few hundred nanoseconds.
        self._id_prefix = os.urandom(6).hex()
        self._requests = 0
        self._connections: Connections | None = None
        self._listener: asyncio.Server | None = None
        metrics.watch(self._in_flight)

    async def start(self) -> str:
        """Listen on `node.listen`; returns the address, with the port that was given for 0.

        Raises OSError when the address is taken.
        """
        host, port = split_address(self._api.config.node.listen, "node.listen")
        self._connections = Connections(
            self._answer, connections_max=self._api.limits.connections_max
        )
        self._listener = await asyncio.get_running_loop().create_server(
            self._connections.accept, host, port, backlog=_BACKLOG
        )
        self._deadlines.start()
        bound = self._listener.sockets[0].getsockname()
        shown = f"[{host}]" if ":" in host else host
        return f"{shown}:{bound[1]}"

    def begin_shutdown(self) -> None:
        """Answer new requests with 503, so that clients and balancers turn to other nodes."""
        self._api.is_draining = True

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop listening, let the requests in flight end, cancel those that do not in time."""
        self.begin_shutdown()
        if self._listener is not None:
            self._listener.close()
        clock = asyncio.get_running_loop().time
        ends_at = clock() + grace_s
        while self._api.admission.total and clock() < ends_at:
            await asyncio.sleep(0.01)
        self._deadlines.cancel_all()
        if self._connections is not None:
            self._connections.pre_shutdown()  # idle ones end at once
            await self._connections.shutdown(1.0)
        await self._deadlines.stop()

    def _in_flight(self) -> InFlight:
        admission, connections = self._api.admission, self._connections
        return InFlight(
            by_class=dict(admission.by_class),
            connections=connections.open if connections else 0,
            body_bytes=admission.body_bytes,
            refused=admission.refused,
            refused_connections=connections.refused if connections else 0,
        )

    async def _answer(self, request: BaseRequest) -> Reply:
        """The one way of every request; whatever happens, it ends in a reply."""
        api = self._api
        started = api.clock()
        method = request.method
        self._requests += 1
        request_id = request_id_of(request) or f"{self._id_prefix}-{self._requests:x}"
        template, caller = _UNROUTED, ANONYMOUS
        try:
            if method == "OPTIONS":
                reply = self._options(request)
            else:
                route, memory_id = self._router.find(method, request.rel_url.raw_path)
                template = route.path
                headers = request.headers
                self._fence.check(headers.get("Host"), headers.get("Origin"))
                if not route.is_open:
                    caller = self._authenticator.authenticate(
                        headers.get("Authorization"), headers.get("X-API-Key")
                    )
                if route.needs_admin:
                    caller.must_be_admin()
                if api.is_draining and route.kind != "free":
                    raise ShuttingDown(
                        "This node is shutting down.", hint="Ask another node, or retry."
                    )
                reply = await self._admitted(request, route, memory_id, caller, started)
        except MethodNotAllowed as error:
            reply = error_reply(error)
            reply.headers_raw += b"Allow: %b\r\n" % error.allowed.encode()
        except AgentMemError as error:
            if error.status == 500:
                _log.error("request %s (%s %s)", request_id, method, template, exc_info=error)
            reply = error_reply(error, close=not request.content.is_eof())
        except ConnectionError:
            raise
        except Exception:
            _log.exception("request %s (%s %s) failed", request_id, method, template)
            reply = error_reply(
                InternalError(
                    "Something went wrong in this node.",
                    hint="Its log tells more under the request id.",
                    request_id=request_id,
                )
            )
        reply.request_id = request_id.encode()
        seconds = api.clock() - started
        api.metrics.request(method, template, reply.code, seconds)
        if self._access_log is not None:
            self._access_log.write(
                request, template, reply.code, len(reply.content), seconds, caller, request_id
            )
        return reply

    async def _admitted(
        self,
        request: BaseRequest,
        route: Route,
        memory_id: str,
        principal: Principal,
        started: float,
    ) -> Reply:
        """Within the bounds of the node: read the body, decode, hand over to the handler."""
        api = self._api
        admission = api.admission
        admission.enter(route.kind)
        held = HeldBody(admission)
        ticket = self._deadlines.enter(started)
        try:
            within_s = deadline_s(request, api.limits)
            ticket.ends_at = deadline = started + within_s
            body = b""
            if route.body is not None:
                _refuse_packed(request)
                body = await held.read(request, api.limits, within_s, route.body_bytes_max)
            request_id, fingerprint = None, b""
            if route.takes_idempotency_key:
                request_id, fingerprint = write_identity(request, principal.tenant, body)
            caller = Caller(principal.tenant, principal.key_id, deadline, request_id, fingerprint)
            exchange = Exchange(request, route, memory_id, caller, body)
            query = route.query.decode(request.rel_url.query.items())
            argument = query if route.body is None else route.body.decode(body)
            return await route.handler(api, exchange, argument)
        except asyncio.CancelledError:
            if not self._deadlines.overran(ticket):
                raise
            raise DeadlineExceeded(
                "There was no answer before the request's deadline.",
                hint="Whether a write took effect is unknown: send it again with the same "
                "Idempotency-Key.",
            ) from None
        finally:
            self._deadlines.leave(ticket)
            held.release()
            admission.leave(route.kind)

    def _options(self, request: BaseRequest) -> Reply:
        allow = self._router.allowed(request.rel_url.raw_path)
        return Reply(204, b"", headers_raw=b"Allow: %b\r\n" % allow.encode())


def _refuse_packed(request: BaseRequest) -> None:
    packing = request.headers.get("Content-Encoding")
    if packing is not None and packing.lower() != "identity":
        raise BadRequest(
            f"The body is packed ({packing[:40]!r}), which is not taken.",
            hint="Send plain JSON.",
        )
