"""What the calls return: plain frozen dataclasses, read from the server's JSON.

Reading is lenient about what a newer server adds and strict about what this client needs:
a missing id or content is a `ProtocolError`, an unknown field is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentmem_client.errors import AgentMemError, ProtocolError, error_class

Json = Mapping[str, Any]


def _need(body: Json, name: str) -> Any:
    try:
        return body[name]
    except (KeyError, TypeError) as missing:
        raise ProtocolError(f"The server's answer has no {name!r}.") from missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One memory. Times are RFC 3339 text in UTC with milliseconds."""

    id: str
    content: str
    user_id: str | None = None
    agent_id: str | None = None
    app_id: str | None = None
    run_id: str | None = None
    memory_type: str = "episodic"
    importance: float = 0.5
    categories: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = ""
    updated_at: str = ""
    expires_at: str | None = None
    version: int = 1
    hash: str = ""

    @classmethod
    def read(cls, body: Json) -> Memory:
        return cls(**_memory_fields(body))


def _memory_fields(body: Json) -> dict[str, Any]:
    return {
        "id": _need(body, "id"),
        "content": _need(body, "content"),
        "user_id": body.get("user_id"),
        "agent_id": body.get("agent_id"),
        "app_id": body.get("app_id"),
        "run_id": body.get("run_id"),
        "memory_type": body.get("memory_type", "episodic"),
        "importance": float(body.get("importance", 0.5)),
        "categories": tuple(body.get("categories") or ()),
        "metadata": body.get("metadata") or {},
        "created_at": body.get("created_at", ""),
        "updated_at": body.get("updated_at", ""),
        "expires_at": body.get("expires_at"),
        "version": int(body.get("version", 1)),
        "hash": body.get("hash", ""),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Memory):
    """A memory that a search found. `legs` is there when the search asked to `explain`."""

    score: float = 0.0
    legs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Json) -> Found:
        legs = body.get("legs") or body.get("explain") or {}
        return cls(**_memory_fields(body), score=float(body.get("score", 0.0)), legs=legs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """The outcome of one item of a batch, in the order it was given: `memory` or `error`."""

    id: str | None = None
    memory: Memory | None = None
    error: AgentMemError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @classmethod
    def read(cls, body: Json) -> Added:
        error = _item_error(body)
        stored = body.get("memory")
        return cls(
            id=body.get("id"),
            memory=Memory.read(stored) if stored else None,
            error=error,
        )


def _item_error(body: Json) -> AgentMemError | None:
    if body.get("event") != "ERROR":
        return None
    refusal = body.get("error") or {}
    kind = error_class(refusal.get("code"), 400)
    return kind(str(refusal.get("detail", "refused")), status=400)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddResult:
    """What an add did, item by item. `token` makes a later `session` read see it anywhere."""

    results: tuple[Added, ...] = ()
    token: str = ""

    @property
    def memories(self) -> tuple[Memory, ...]:
        return tuple(item.memory for item in self.results if item.memory is not None)

    @property
    def errors(self) -> tuple[tuple[int, AgentMemError], ...]:
        """(position in the batch, error) of every refused item."""
        return tuple((at, item.error) for at, item in enumerate(self.results) if item.error)

    @classmethod
    def read(cls, body: Json) -> AddResult:
        items = tuple(Added.read(item) for item in _need(body, "results"))
        return cls(results=items, token=body.get("token", ""))

    def __iter__(self) -> Iterator[Added]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """One id of a delete: gone (`ok`), or the reason why not."""

    id: str
    error: AgentMemError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @classmethod
    def read(cls, body: Json) -> Deleted:
        return cls(id=str(_need(body, "id")), error=_item_error(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteResult:
    results: tuple[Deleted, ...] = ()
    token: str = ""

    @classmethod
    def read(cls, body: Json) -> DeleteResult:
        items = tuple(Deleted.read(item) for item in _need(body, "results"))
        return cls(results=items, token=body.get("token", ""))

    def __iter__(self) -> Iterator[Deleted]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Best first. `partial` names the shards that did not answer in time: normally empty."""

    results: tuple[Found, ...] = ()
    partial: tuple[str, ...] = ()
    next_cursor: str | None = None
    token: str = ""
    took_ms: float = 0.0

    @classmethod
    def read(cls, body: Json) -> SearchResult:
        return cls(
            results=tuple(Found.read(hit) for hit in _need(body, "results")),
            partial=tuple(str(name) for name in body.get("partial") or ()),
            next_cursor=body.get("next_cursor") or body.get("cursor"),
            token=body.get("token", ""),
            took_ms=float(body.get("took_ms", 0.0)),
        )

    def __iter__(self) -> Iterator[Found]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a listing, newest first."""

    results: tuple[Memory, ...] = ()
    next_cursor: str | None = None
    partial: tuple[str, ...] = ()
    token: str = ""

    @classmethod
    def read(cls, body: Json) -> Page:
        return cls(
            results=tuple(Memory.read(item) for item in _need(body, "results")),
            next_cursor=body.get("next_cursor"),
            partial=tuple(str(name) for name in body.get("partial") or ()),
            token=body.get("token", ""),
        )

    def __iter__(self) -> Iterator[Memory]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One version of a memory: its text before and after an `ADD`, `UPDATE` or `DELETE`."""

    memory_id: str
    event: str
    version: int
    old_content: str | None = None
    new_content: str | None = None
    at: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Json) -> HistoryEntry:
        return cls(
            memory_id=str(_need(body, "memory_id")),
            event=str(_need(body, "event")),
            version=int(_need(body, "version")),
            old_content=body.get("old_content"),
            new_content=body.get("new_content"),
            at=body.get("at", ""),
            metadata=body.get("metadata") or {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """One node about itself: `is_ready` when its shards have leaders and it has caught up."""

    is_ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Json) -> Health:
        ready = body.get("ready", body.get("status") in ("ok", "ready"))
        return cls(is_ready=bool(ready), details=body)
