"""Each call of the API as a value: what to send, where it belongs, how to read the answer.

Nothing here does I/O: `core.Exchange` decides what is sent when, the drivers send it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from agentmem_client.options import (
    AddOptions,
    ListOptions,
    ReadOptions,
    SearchOptions,
    UpdateOptions,
    WriteOptions,
)
from agentmem_client.results import (
    AddResult,
    DeleteResult,
    Health,
    HistoryEntry,
    Memory,
    Page,
    SearchResult,
)
from agentmem_client.topology import Shard, Topology

T = TypeVar("T")

API = "/api/v1"
_SCOPE = ("user_id", "agent_id", "app_id", "run_id")


@dataclass(frozen=True, slots=True)
class Anywhere:
    """Any node may answer, the nearest first."""


@dataclass(frozen=True, slots=True)
class ToOwner:
    owner: str

    def shard(self, topology: Topology) -> Shard | None:
        return topology.shard_of_owner(self.owner)


@dataclass(frozen=True, slots=True)
class ToMemory:
    memory_id: str

    def shard(self, topology: Topology) -> Shard | None:
        return topology.shard_of_memory(self.memory_id)


@dataclass(frozen=True, slots=True)
class ToNode:
    """This node and no other: a question about itself."""

    url: str

    def shard(self, topology: Topology) -> Shard | None:
        return None


Route = Anywhere | ToOwner | ToMemory | ToNode


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call. A write has an `idempotency_key`, drawn once: every retry sends the same."""

    name: str
    method: str
    path: str
    read: Callable[[Any], T]
    route: Route = field(default_factory=Anywhere)
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    idempotency_key: str | None = None
    deadline_s: float | None = None
    # Statuses beyond 2xx whose body is the answer, not an error.
    also_answers: frozenset[int] = frozenset()


def owner_of(scope: Mapping[str, Any]) -> str:
    """The scope id that routes, with its kind: user, else agent, else app, else run, else "".

    >>> owner_of({"agent_id": "planner", "run_id": "r1"})
    'agent:planner'
    """
    for name in _SCOPE:
        if scope.get(name) is not None:
            return f"{name.removesuffix('_id')}:{scope[name]}"
    return ""


def owner_route(scope: Mapping[str, Any]) -> Route:
    """Where a memory of this scope is stored."""
    owner = owner_of(scope)
    return ToOwner(owner) if owner else Anywhere()


def query_route(scope: Mapping[str, Any]) -> Route:
    """Who answers a query over this scope.

    Only a user's memories are certain to lie together: a memory of an agent may be some user's
    too, and is stored with that user.
    """
    if scope.get("user_id") is None:
        return Anywhere()
    return ToOwner(owner_of({"user_id": scope["user_id"]}))


def encode(body: Any) -> bytes:
    """JSON. Raises ValueError for NaN and infinity, which JSON cannot say."""
    return json.dumps(
        body, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain
    ).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def key_or_new(given: str | None) -> str:
    return given or secrets.token_hex(16)


def drop_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


ADD_FIELDS = frozenset(AddOptions.__annotations__) - frozenset(WriteOptions.__annotations__)
SEARCH_FIELDS = frozenset(SearchOptions.__annotations__) - {"deadline_s"}
_LIST_FIELDS = frozenset(ListOptions.__annotations__) - {"deadline_s"}


def check_names(options: Mapping[str, Any], allowed: Iterable[str], call: str) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"{call}() has no argument {unknown[0]!r}; it knows {sorted(allowed)}")


def add(
    content: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    options: AddOptions,
) -> Call[AddResult]:
    check_names(options, AddOptions.__annotations__, "add")
    fields = drop_none({name: value for name, value in options.items() if name in ADD_FIELDS})
    body = drop_none({"content": content, "messages": messages}) | fields
    return Call(
        name="add",
        method="POST",
        path=f"{API}/memories",
        read=AddResult.read,
        route=owner_route(fields),
        body=encode(body),
        idempotency_key=key_or_new(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def _memory_path(memory_id: str) -> str:
    return f"{API}/memories/{quote(memory_id, safe='')}"


def _query(fields: Mapping[str, Any]) -> str:
    pairs = {
        name: encode(value).decode() if isinstance(value, Mapping) else value
        for name, value in drop_none(fields).items()
    }
    return "?" + urlencode(pairs) if pairs else ""


def _read_memory(body: Any) -> Memory:
    """From a bare memory, or from `{"memory": {...}, "version": ..., "token": ...}`."""
    if isinstance(body, Mapping) and isinstance(body.get("memory"), Mapping):
        body = body["memory"]
    return Memory.read(body)


def get(memory_id: str, options: ReadOptions) -> Call[Memory]:
    check_names(options, ReadOptions.__annotations__, "get")
    asked = {name: options.get(name) for name in ("consistency", "token")}
    return Call(
        name="get",
        method="GET",
        path=_memory_path(memory_id) + _query(asked),
        read=_read_memory,
        route=ToMemory(memory_id),
        deadline_s=options.get("deadline_s"),
    )


def update(memory_id: str, content: str | None, options: UpdateOptions) -> Call[Memory]:
    """Only the given fields change; `expires_at=None` clears it."""
    check_names(options, UpdateOptions.__annotations__, "update")
    body: dict[str, Any] = {
        name: value
        for name, value in options.items()
        if name not in WriteOptions.__annotations__ and (value is not None or name == "expires_at")
    }
    if content is not None:
        body["content"] = content
    return Call(
        name="update",
        method="PATCH",
        path=_memory_path(memory_id),
        read=_read_memory,
        route=ToMemory(memory_id),
        body=encode(body),
        idempotency_key=key_or_new(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def delete(memory_id: str, expected_version: int | None, options: WriteOptions) -> Call[None]:
    check_names(options, WriteOptions.__annotations__, "delete")
    guard = () if expected_version is None else (("If-Match", f'"{expected_version}"'),)
    return Call(
        name="delete",
        method="DELETE",
        path=_memory_path(memory_id),
        read=_read_nothing,
        route=ToMemory(memory_id),
        headers=guard,
        idempotency_key=key_or_new(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def _read_nothing(body: Any) -> None:
    for item in (body or {}).get("results", ()):
        error = DeleteResult.read({"results": [item]}).results[0].error
        if error is not None:
            raise error


def list_page(options: ListOptions) -> Call[Page]:
    check_names(options, ListOptions.__annotations__, "list")
    fields = {name: value for name, value in options.items() if name in _LIST_FIELDS}
    return Call(
        name="list",
        method="GET",
        path=f"{API}/memories" + _query(fields),
        read=Page.read,
        route=query_route(options),
        deadline_s=options.get("deadline_s"),
    )


def history(memory_id: str, options: ReadOptions) -> Call[tuple[HistoryEntry, ...]]:
    check_names(options, {"deadline_s"}, "history")
    return Call(
        name="history",
        method="GET",
        path=_memory_path(memory_id) + "/history",
        read=lambda body: tuple(HistoryEntry.read(entry) for entry in body["results"]),
        route=ToMemory(memory_id),
        deadline_s=options.get("deadline_s"),
    )


def search(query: str | None, options: SearchOptions) -> Call[SearchResult]:
    check_names(options, SearchOptions.__annotations__, "search")
    fields = {name: value for name, value in options.items() if name in SEARCH_FIELDS}
    return Call(
        name="search",
        method="POST",
        path=f"{API}/memories/search",
        read=SearchResult.read,
        route=query_route(fields),
        body=encode(drop_none({"query": query, **fields})),
        deadline_s=options.get("deadline_s"),
    )


def cluster(deadline_s: float | None = None) -> Call[Topology]:
    return Call(
        name="cluster",
        method="GET",
        path=f"{API}/cluster",
        read=Topology.read,
        deadline_s=deadline_s,
    )


def health(url: str, deadline_s: float | None = None) -> Call[Health]:
    """One node about itself. That it is not ready is an answer, not a failure."""
    return Call(
        name="health",
        method="GET",
        path="/health/ready",
        read=Health.read,
        route=ToNode(url),
        deadline_s=deadline_s,
        also_answers=frozenset({503}),
    )
