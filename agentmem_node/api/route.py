"""What a route of the API is; `agentmem_node.api.routes` lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    DeadlineExceeded,
    DiskFull,
    Forbidden,
    InternalError,
    InvalidField,
    MapMoved,
    NoQuorum,
    NotLeader,
    Overloaded,
    ShuttingDown,
    TooLarge,
    Unauthorized,
    Unavailable,
    WrongShard,
)
from agentmem_node.api import shapes
from agentmem_node.api.admission import Class
from agentmem_node.api.context import Api
from agentmem_node.api.decoding import BatchAddBody, Body, Query
from agentmem_node.api.exchange import Exchange
from agentmem_node.api.reply import Reply

Handler = Callable[[Api, Exchange, Any], Awaitable[Reply]]
Errors = tuple[type[AgentMemError], ...]

BASE = "/api/v1"
# What every route but the open ones can answer.
COMMON: Errors = (Unauthorized, Forbidden, Overloaded, ShuttingDown, InternalError)
READ: Errors = (
    InvalidField,
    NoQuorum,
    NotLeader,
    WrongShard,
    MapMoved,
    Unavailable,
    DeadlineExceeded,
)
WRITE: Errors = (BadRequest, TooLarge, DiskFull, *READ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path. `{id}` in a path stands for an id, and `id_meaning` says whose."""

    method: str
    path: str
    name: str
    summary: str
    description: str = ""
    tag: str
    handler: Handler
    kind: Class
    body: Body[Any] | BatchAddBody | None = None
    query: Query[Any]
    answer: type[msgspec.Struct] | None = None  # None: not JSON, see content_type
    content_type: str = "application/json"
    status: int = 200
    further_statuses: tuple[tuple[int, str], ...] = ()
    errors: Errors = ()
    is_open: bool = False  # answers without an API key
    needs_admin: bool = False  # where there are keys, it takes one with `admin = true`
    body_bytes_max: int | None = None  # None: limits.body_bytes_max
    is_once: bool = False  # sent again under the same Idempotency-Key, it takes effect once
    id_meaning: str = "The memory's id, a UUID."
    example: Any = None

    @property
    def is_write(self) -> bool:
        """Whether it writes memories."""
        return self.kind == "write"

    @property
    def takes_idempotency_key(self) -> bool:
        return self.is_write or self.is_once


def make_route(
    method: str,
    path: str,
    handler: Handler,
    kind: Class,
    summary: str,
    *,
    body: type[msgspec.Struct] | BatchAddBody | None = None,
    query: type[msgspec.Struct] = shapes.NoQuery,
    **more: Any,
) -> Route:
    is_open = more.get("is_open", False)
    errors = more.pop("errors", ())
    return Route(
        method=method,
        path=path,
        name=handler.__name__,
        summary=summary,
        handler=handler,
        kind=kind,
        body=Body(body) if isinstance(body, type) else body,
        query=Query(query),
        errors=errors if is_open else (*errors, *COMMON),
        **more,
    )
