"""The bodies of requests and answers: the types that validate are the types that document.

`agentmem_node.api` decodes JSON straight into these (unknown fields are refused, by name) and
generates `/openapi.json` from them; `agentmem_node.service` takes and returns them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from agentmem_node.model.memory import HistoryEntry, MemoryType
from agentmem_node.model.search import Consistency, Fusion, LegName

Importance = Annotated[float, Meta(ge=0.0, le=1.0, description="0 (trivial) to 1 (vital).")]
ScopeId = Annotated[str, Meta(min_length=1, max_length=256)]


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: Literal["user", "assistant", "system", "tool"]
    content: str
    name: str | None = None


class AddRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`content` or `messages`, and at least one scope id."""

    content: str | None = None
    messages: list[Message] | None = None
    user_id: ScopeId | None = None
    agent_id: ScopeId | None = None
    app_id: ScopeId | None = None
    run_id: ScopeId | None = None
    metadata: dict[str, Any] = {}
    memory_type: MemoryType = "episodic"
    importance: Importance | None = None
    categories: list[str] = []
    created_at: str | None = None  # back-dates; default: now
    expires_at: str | None = None
    vector: list[float] | None = None
    infer: bool = False


class BatchAddRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    memories: list[AddRequest]


class ItemError(msgspec.Struct, kw_only=True):
    code: str
    detail: str


class AddedItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One item of an add: the memory as stored, or why it was refused."""

    event: Literal["ADD", "ERROR"]
    id: str | None = None
    memory: msgspec.Raw | None = None
    error: ItemError | None = None


class AddAnswer(msgspec.Struct, kw_only=True):
    results: list[AddedItem]
    token: str


class UpdateRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Only the given fields change. `expires_at: null` clears it."""

    content: str | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    memory_type: MemoryType | msgspec.UnsetType = msgspec.UNSET
    importance: Importance | msgspec.UnsetType = msgspec.UNSET
    categories: list[str] | msgspec.UnsetType = msgspec.UNSET
    expires_at: str | msgspec.UnsetType | None = msgspec.UNSET
    vector: list[float] | msgspec.UnsetType = msgspec.UNSET
    expected_version: Annotated[int, Meta(ge=1)] | None = None


class BatchDeleteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    ids: list[str]


class DeletedItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str
    event: Literal["DELETE", "ERROR"]
    error: ItemError | None = None


class DeleteAnswer(msgspec.Struct, kw_only=True):
    results: list[DeletedItem]
    token: str


class MemoryAnswer(msgspec.Struct, kw_only=True):
    """One memory (`memory` is the stored JSON) with the token that a later read can present."""

    memory: msgspec.Raw
    version: int
    token: str


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`query` and/or `vector`. `legs` chooses and weighs engines; default: all that apply."""

    query: str | None = None
    vector: list[float] | None = None
    user_id: ScopeId | None = None
    agent_id: ScopeId | None = None
    app_id: ScopeId | None = None
    run_id: ScopeId | None = None
    filters: dict[str, Any] | None = None
    legs: dict[LegName, float] | list[LegName] | None = None
    top_k: Annotated[int, Meta(ge=1)] = 10
    threshold: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    fusion: Fusion = "weighted"
    consistency: Consistency = "linearizable"
    token: str | None = None
    explain: bool = False
    cursor: str | None = None


class SearchBatchRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    searches: list[SearchRequest]


class ListQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """GET /memories: newest first."""

    user_id: ScopeId | None = None
    agent_id: ScopeId | None = None
    app_id: ScopeId | None = None
    run_id: ScopeId | None = None
    filters: dict[str, Any] | None = None
    limit: Annotated[int, Meta(ge=1)] = 100
    cursor: str | None = None
    consistency: Consistency = "linearizable"
    token: str | None = None


class ListAnswer(msgspec.Struct, kw_only=True):
    results: list[msgspec.Raw]
    next_cursor: str | None
    partial: list[str]
    token: str


class HistoryAnswer(msgspec.Struct, kw_only=True):
    results: list[HistoryEntry]
    token: str
