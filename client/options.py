"""The keyword arguments of the calls, as types: an editor completes them, mypy checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Consistency = Literal["linearizable", "session", "eventual"]


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
    """`consistency="session"` with the `token` of an answer: read your own writes anywhere."""

    consistency: Consistency
    token: str | None
    deadline_s: float | None


class AddOptions(ScopeOptions, WriteOptions, total=False):
    """Times are RFC 3339 text; `importance` is 0 to 1; `vector` replaces the node's embedding."""

    metadata: Mapping[str, Any]
    memory_type: str
    importance: float
    categories: Sequence[str]
    created_at: str
    expires_at: str
    vector: Sequence[float]
    infer: bool


class UpdateOptions(WriteOptions, total=False):
    """Only what is given changes; `expires_at=None` clears it."""

    metadata: Mapping[str, Any]
    memory_type: str
    importance: float
    categories: Sequence[str]
    expires_at: str | None
    vector: Sequence[float]
    expected_version: int | None


class ListOptions(ScopeOptions, ReadOptions, total=False):
    """`limit`: memories of one page."""

    filters: Mapping[str, Any] | None
    limit: int
    cursor: str | None


class SearchOptions(ScopeOptions, ReadOptions, total=False):
    """`legs`: engines to use, or their weights; default: all that apply."""

    vector: Sequence[float]
    filters: Mapping[str, Any] | None
    legs: Mapping[str, float] | Sequence[str] | None
    top_k: int
    threshold: float | None
    fusion: Literal["weighted", "rrf"]
    explain: bool
    cursor: str | None
