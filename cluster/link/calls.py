"""Calls over one connection: what this node asked of a peer, and what the peer asked of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    Unavailable,
)
from agentmem_cluster.link import wire
from agentmem_cluster.link.connection import Connection, LinkLimits

log = logging.getLogger("agentmem.link")

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]

_TIMEOUT_MS_MAX = 3_600_000
_METHOD_CHARS_MAX = 200


class Calls:
    def __init__(
        self, connection: Connection, handlers: Mapping[str, Handler], limits: LinkLimits
    ) -> None:
        self._connection = connection
        self._handlers = handlers
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._serving_bytes = 0

    # -- asking -------------------------------------------------------------------------

    async def call(self, method: str, body: dict[str, Any], timeout_s: float) -> Any:
        """The peer's answer. Raises its error, Unavailable, Overloaded or DeadlineExceeded."""
        connection = self._connection
        if connection.buffered_bytes > self._limits.buffer_bytes_max:
            raise Overloaded(
                f"Too much waits to be sent to node {connection.peer}.", peer=connection.peer
            )
        self._last_id += 1
        call_id = self._last_id
        timeout_ms = max(1, min(int(timeout_s * 1000), _TIMEOUT_MS_MAX))
        try:
            connection.send([wire.CALL, call_id, method, body, timeout_ms])
        except ValueError as wrong:
            raise InternalError(f"Call {method} cannot be sent: {wrong}") from wrong
        future: asyncio.Future[Any] = self._loop.create_future()
        self._asked[call_id] = future
        timer = self._loop.call_later(timeout_s, self._timed_out, call_id, method)
        answered = False
        try:
            result = await future
            answered = True
            return result
        except AgentMemError:
            answered = True
            raise
        finally:
            timer.cancel()
            self._asked.pop(call_id, None)
            if not answered:  # the caller was cancelled, so the peer need not go on
                connection.send([wire.CANCEL, call_id])

    def _timed_out(self, call_id: int, method: str) -> None:
        future = self._asked.get(call_id)
        if future is not None and not future.done():
            self._connection.send([wire.CANCEL, call_id])
            future.set_exception(
                DeadlineExceeded(
                    f"Node {self._connection.peer} did not answer {method} in time.",
                    hint="The outcome is unknown: retry with the same request id.",
                )
            )

    def lost(self, reason: str) -> None:
        """The connection is gone: fail what was asked, stop what was being served."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(
                    Unavailable(
                        f"The connection to node {self._connection.peer} was lost before it "
                        f"answered ({reason}).",
                        hint="The outcome is unknown: retry with the same request id.",
                        peer=self._connection.peer,
                    )
                )
        for task in list(self._serving.values()):
            task.cancel()

    # -- frames of the peer -------------------------------------------------------------

    def received(self, frame: list[Any], size_bytes: int) -> bool:
        """Take a frame that concerns calls. False: it is malformed, and the connection must go."""
        kind = frame[0]
        if len(frame) < 2 or type(frame[1]) is not int:
            return False
        call_id = frame[1]
        if kind == wire.CANCEL:
            task = self._serving.get(call_id)
            if task is not None:
                task.cancel()
            return True
        if kind == wire.CALL:
            return self._serve(frame, size_bytes)
        if len(frame) != 3:
            return False
        future = self._asked.get(call_id)
        if future is not None and not future.done():
            if kind == wire.REPLY:
                future.set_result(frame[2])
            else:
                future.set_exception(wire.error_from_wire(frame[2]))
        return True  # nobody waits any more: late answers are normal

    def _serve(self, frame: list[Any], size_bytes: int) -> bool:
        if len(frame) != 5:
            return False
        _, call_id, method, body, timeout_ms = frame
        if (
            not isinstance(method, str)
            or len(method) > _METHOD_CHARS_MAX
            or not isinstance(body, dict)
            or type(timeout_ms) is not int
            or not 0 < timeout_ms <= _TIMEOUT_MS_MAX
            or call_id in self._serving
        ):
            return False
        handler = self._handlers.get(method)
        if handler is None:
            self._answer_error(
                call_id,
                BadRequest(f"This node knows no call {method!r}.", hint="Upgrade it."),
            )
            return True
        limits = self._limits
        if (
            len(self._serving) >= limits.calls_max
            or self._serving_bytes + size_bytes > limits.calls_bytes_max
        ):
            self._answer_error(call_id, Overloaded("The node is at work on too many calls."))
            return True
        self._serving_bytes += size_bytes
        self._serving[call_id] = self._loop.create_task(
            self._run(handler, call_id, method, body, timeout_ms / 1000, size_bytes)
        )
        return True

    async def _run(
        self,
        handler: Handler,
        call_id: int,
        method: str,
        body: dict[str, Any],
        timeout_s: float,
        size_bytes: int,
    ) -> None:
        try:
            peer = self._connection.peer or ""
            async with asyncio.timeout(timeout_s):
                result = await handler(peer, body)
            self._connection.send([wire.REPLY, call_id, result])
        except AgentMemError as error:
            self._answer_error(call_id, error)
        except TimeoutError:
            self._answer_error(
                call_id, DeadlineExceeded(f"Call {method} was not finished in time.")
            )
        except Exception:
            log.exception("link: call %s failed", method)
            self._answer_error(call_id, InternalError(f"Call {method} failed on the peer."))
        finally:
            self._serving.pop(call_id, None)
            self._serving_bytes -= size_bytes

    def _answer_error(self, call_id: int, error: AgentMemError) -> None:
        try:
            self._connection.send([wire.ERROR, call_id, wire.error_to_wire(error)])
        except ValueError:  # text that is not UTF-8, or details beyond the frame
            bare = InternalError(f"{type(error).__name__} on the peer, which it cannot describe.")
            self._connection.send([wire.ERROR, call_id, wire.error_to_wire(bare)])
