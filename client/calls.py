"""Each call of the API as a value: what to send, where it belongs, how to read the answer.

Nothing here does I/O: `core.Exchange` decides what is sent when, the drivers send it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote, urlencode

from agentmem_client.results import (
    AddResult,
    DeleteResult,
    HistoryEntry,
    Memory,
    Page,
    SearchResult,
)
from agentmem_client.topology import Shard, Topology

T = TypeVar("T")

Consistency = Literal["linearizable", "session", "eventual"]
_API = "/api/v1"
_SCOPE = ("user_id", "agent_id", "app_id", "run_id")


class ScopeOptions(TypedDict, total=False):
    """Whose memories. At least one for an add; in a query a missing one is unconstrained."""

    user_id: str | None
    agent_id: str | None
    app_id: str | None
    run_id: str | None


class WriteOptions(TypedDict, total=False):
    """`deadline_s`: for the whole call, retries included. The key makes a repeat harmless."""

    idempotency_key: str | None
    deadline_s: float | None


class ReadOptions(TypedDict, total=False):
    """`token`, of an earlier answer, with `consistency="session"`: read your own writes anywhere."""

    consistency: Consistency
    token: str | None
    deadline_s: float | None


class AddOptions(ScopeOptions, WriteOptions, total=False):
    metadata: Mapping[str, Any]
    memory_type: str
    importance: float
    categories: Sequence[str]
    created_at: str
    expires_at: str
    vector: Sequence[float]
    infer: bool


class UpdateOptions(WriteOptions, total=False):
    metadata: Mapping[str, Any]
    memory_type: str
    importance: float
    categories: Sequence[str]
    expires_at: str | None
    vector: Sequence[float]
    expected_version: int | None


class ListOptions(ScopeOptions, ReadOptions, total=False):
    filters: Mapping[str, Any] | None
    limit: int
    cursor: str | None


class SearchOptions(ScopeOptions, ReadOptions, total=False):
    vector: Sequence[float]
    filters: Mapping[str, Any] | None
    legs: Mapping[str, float] | Sequence[str] | None
    top_k: int
    threshold: float | None
    fusion: Literal["weighted", "rrf"]
    explain: bool
    cursor: str | None


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


Route = Anywhere | ToOwner | ToMemory


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


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Items that belong to several leaders: one call for each, answers put back in order."""

    name: str
    items: tuple[Any, ...]
    routes: tuple[Route, ...]
    call: Callable[[tuple[Any, ...], Route], Call[T]]
    merge: Callable[[Sequence[tuple[tuple[int, ...], T]]], T]
    whole: bool = False

    def split(self, topology: Topology | None) -> list[tuple[tuple[int, ...], Call[T]]]:
        """(positions of the items, call) for each leader; one call when the map is not known."""
        groups: dict[str | None, list[int]] = {}
        for at, route in enumerate(self.routes):
            leader = None
            if topology is not None and not self.whole and not isinstance(route, Anywhere):
                shard = route.shard(topology)
                leader = shard.leader if shard else None
            groups.setdefault(leader, []).append(at)
        return [
            (tuple(at), self.call(tuple(self.items[i] for i in at), self.routes[at[0]]))
            for at in groups.values()
        ]


def owner_of(scope: Mapping[str, Any]) -> str:
    """The scope id that routes, with its kind: user, else agent, else app, else run, else "".

    >>> owner_of({"agent_id": "planner", "run_id": "r1"})
    'agent:planner'
    """
    for name in _SCOPE:
        if scope.get(name) is not None:
            return f"{name.removesuffix('_id')}:{scope[name]}"
    return ""


def _owner_route(scope: Mapping[str, Any]) -> Route:
    owner = owner_of(scope)
    return ToOwner(owner) if owner else Anywhere()


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


def _key(given: str | None) -> str:
    return given or secrets.token_hex(16)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


_ADD_FIELDS = frozenset(AddOptions.__annotations__) - frozenset(WriteOptions.__annotations__)
_SEARCH_FIELDS = frozenset(SearchOptions.__annotations__) - {"deadline_s"}
_LIST_FIELDS = frozenset(ListOptions.__annotations__) - {"deadline_s"}


def _only(options: Mapping[str, Any], allowed: Iterable[str], call: str) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"{call}() has no argument {unknown[0]!r}; it knows {sorted(allowed)}")


def add(
    content: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    options: AddOptions,
) -> Call[AddResult]:
    _only(options, AddOptions.__annotations__, "add")
    fields = _given({name: value for name, value in options.items() if name in _ADD_FIELDS})
    body = _given({"content": content, "messages": messages}) | fields
    return Call(
        name="add",
        method="POST",
        path=f"{_API}/memories",
        read=AddResult.read,
        route=_owner_route(fields),
        body=encode(body),
        idempotency_key=_key(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def add_many(
    memories: Iterable[Mapping[str, Any]], shared: AddOptions
) -> Batch[AddResult]:
    """Items are the fields of an add each; `shared` fills what an item leaves out."""
    _only(shared, AddOptions.__annotations__, "add_many")
    defaults = _given({name: value for name, value in shared.items() if name in _ADD_FIELDS})
    items = tuple({**defaults, **memory} for memory in memories)
    given_key = shared.get("idempotency_key")

    def call(part: tuple[Any, ...], route: Route) -> Call[AddResult]:
        return Call(
            name="add_many",
            method="POST",
            path=f"{_API}/memories/batch",
            read=AddResult.read,
            route=route,
            body=encode({"memories": part}),
            idempotency_key=_key(given_key),
            deadline_s=shared.get("deadline_s"),
        )

    return Batch(
        name="add_many",
        items=items,
        routes=tuple(_owner_route(item) for item in items),
        call=call,
        merge=_merge_added,
        # The parts of a batch depend on who leads now. Under a key that the caller chose, the
        # batch must be the same bytes whenever it is repeated; and an item of several messages
        # has several results, which could not be put back in order.
        whole=given_key is not None or any("messages" in item for item in items),
    )


def _in_order(parts: Sequence[tuple[tuple[int, ...], Any]]) -> tuple[Any, ...]:
    if len(parts) == 1:
        return tuple(parts[0][1].results)
    placed = [
        (at, result)
        for positions, answer in parts
        for at, result in zip(positions, answer.results, strict=True)
    ]
    return tuple(result for _, result in sorted(placed, key=lambda pair: pair[0]))


def merge_tokens(tokens: Iterable[str]) -> str:
    """One token that is at least as late as each. Tokens look like `s03:118,s07:42`."""
    latest: dict[str, int] = {}
    for part in ",".join(tokens).split(","):
        shard, found, applied = part.partition(":")
        if found and applied.isdigit():
            latest[shard] = max(int(applied), latest.get(shard, 0))
    return ",".join(f"{shard}:{applied}" for shard, applied in sorted(latest.items()))


def _merge_added(parts: Sequence[tuple[tuple[int, ...], AddResult]]) -> AddResult:
    return AddResult(
        results=_in_order(parts), token=merge_tokens(answer.token for _, answer in parts)
    )


def _merge_deleted(parts: Sequence[tuple[tuple[int, ...], DeleteResult]]) -> DeleteResult:
    return DeleteResult(
        results=_in_order(parts), token=merge_tokens(answer.token for _, answer in parts)
    )


def _memory_path(memory_id: str) -> str:
    return f"{_API}/memories/{quote(memory_id, safe='')}"


def _query(fields: Mapping[str, Any]) -> str:
    pairs = {
        name: encode(value).decode() if isinstance(value, Mapping) else value
        for name, value in _given(fields).items()
    }
    return "?" + urlencode(pairs) if pairs else ""


def _read_memory(body: Any) -> Memory:
    """From a bare memory, or from `{"memory": {...}, "version": ..., "token": ...}`."""
    if isinstance(body, Mapping) and isinstance(body.get("memory"), Mapping):
        body = body["memory"]
    return Memory.read(body)


def get(memory_id: str, options: ReadOptions) -> Call[Memory]:
    _only(options, ReadOptions.__annotations__, "get")
    asked = {name: options.get(name) for name in ("consistency", "token")}
    return Call(
        name="get",
        method="GET",
        path=_memory_path(memory_id) + _query(asked),
        read=_read_memory,
        route=ToMemory(memory_id),
        deadline_s=options.get("deadline_s"),
    )


def update(
    memory_id: str, content: str | None, options: UpdateOptions
) -> Call[Memory]:
    """Only the given fields change; `expires_at=None` clears it."""
    _only(options, UpdateOptions.__annotations__, "update")
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
        idempotency_key=_key(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def delete(
    memory_id: str, expected_version: int | None, options: WriteOptions
) -> Call[None]:
    _only(options, WriteOptions.__annotations__, "delete")
    guard = () if expected_version is None else (("If-Match", f'"{expected_version}"'),)
    return Call(
        name="delete",
        method="DELETE",
        path=_memory_path(memory_id),
        read=_read_nothing,
        route=ToMemory(memory_id),
        headers=guard,
        idempotency_key=_key(options.get("idempotency_key")),
        deadline_s=options.get("deadline_s"),
    )


def _read_nothing(body: Any) -> None:
    for item in (body or {}).get("results", ()):
        error = DeleteResult.read({"results": [item]}).results[0].error
        if error is not None:
            raise error


def delete_many(ids: Iterable[str], options: WriteOptions) -> Batch[DeleteResult]:
    _only(options, WriteOptions.__annotations__, "delete_many")
    items = tuple(ids)
    given_key = options.get("idempotency_key")

    def call(part: tuple[Any, ...], route: Route) -> Call[DeleteResult]:
        return Call(
            name="delete_many",
            method="POST",
            path=f"{_API}/memories/batch/delete",
            read=DeleteResult.read,
            route=route,
            body=encode({"ids": part}),
            idempotency_key=_key(given_key),
            deadline_s=options.get("deadline_s"),
        )

    return Batch(
        name="delete_many",
        items=items,
        routes=tuple(ToMemory(memory_id) for memory_id in items),
        call=call,
        merge=_merge_deleted,
        whole=given_key is not None,
    )


def list_page(options: ListOptions) -> Call[Page]:
    _only(options, ListOptions.__annotations__, "list")
    fields = {name: value for name, value in options.items() if name in _LIST_FIELDS}
    return Call(
        name="list",
        method="GET",
        path=f"{_API}/memories" + _query(fields),
        read=Page.read,
        route=_owner_route(options),
        deadline_s=options.get("deadline_s"),
    )


def history(memory_id: str, options: ReadOptions) -> Call[tuple[HistoryEntry, ...]]:
    _only(options, {"deadline_s"}, "history")
    return Call(
        name="history",
        method="GET",
        path=_memory_path(memory_id) + "/history",
        read=lambda body: tuple(HistoryEntry.read(entry) for entry in body["results"]),
        route=ToMemory(memory_id),
        deadline_s=options.get("deadline_s"),
    )


def search(query: str | None, options: SearchOptions) -> Call[SearchResult]:
    _only(options, SearchOptions.__annotations__, "search")
    fields = {name: value for name, value in options.items() if name in _SEARCH_FIELDS}
    return Call(
        name="search",
        method="POST",
        path=f"{_API}/memories/search",
        read=SearchResult.read,
        route=_owner_route(fields),
        body=encode(_given({"query": query, **fields})),
        deadline_s=options.get("deadline_s"),
    )


@dataclass(frozen=True, slots=True)
class SearchResults:
    """The answers to `search_many`, in the order of the searches."""

    results: tuple[SearchResult, ...]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> SearchResults:
        return cls(tuple(SearchResult.read(answer) for answer in body["results"]))


def search_many(
    searches: Iterable[Mapping[str, Any]], deadline_s: float | None
) -> Batch[SearchResults]:
    items = []
    for one in searches:
        _only(one, _SEARCH_FIELDS | {"query"}, "search_many")
        items.append(_given(one))

    def call(part: tuple[Any, ...], route: Route) -> Call[SearchResults]:
        return Call(
            name="search_many",
            method="POST",
            path=f"{_API}/memories/search/batch",
            read=SearchResults.read,
            route=route,
            body=encode({"searches": part}),
            deadline_s=deadline_s,
        )

    return Batch(
        name="search_many",
        items=tuple(items),
        routes=tuple(_owner_route(item) for item in items),
        call=call,
        merge=lambda parts: SearchResults(_in_order(parts)),
    )


def cluster(deadline_s: float | None = None) -> Call[Topology]:
    return Call(
        name="cluster",
        method="GET",
        path=f"{_API}/cluster",
        read=Topology.read,
        deadline_s=deadline_s,
    )
