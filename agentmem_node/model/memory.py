"""What a memory is.

A memory belongs to a tenant and a scope, carries text and perhaps a vector, and has versions.
The stored form is the JSON of `Memory`, encoded once when it is written and spliced into
every answer; see `agentmem_node.storage`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MemoryType = Literal[
    "episodic",
    "factual",
    "semantic",
    "procedural",
    "working",
    "core",
    "resource",
    "knowledge",
    "contextual",
]

HistoryEvent = Literal["ADD", "UPDATE", "DELETE"]


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Whose memory it is. Each id is optional; a missing one in a query is unconstrained."""

    user_id: str | None = None
    agent_id: str | None = None
    app_id: str | None = None
    run_id: str | None = None

    @property
    def owner(self) -> str:
        """The scope id that routes, with its kind: user, else agent, else app, else run, else "".

        >>> Scope(agent_id="planner", run_id="r1").owner
        'agent:planner'
        """
        for kind, value in (
            ("user", self.user_id),
            ("agent", self.agent_id),
            ("app", self.app_id),
            ("run", self.run_id),
        ):
            if value is not None:
                return f"{kind}:{value}"
        return ""


class Memory(msgspec.Struct, kw_only=True, omit_defaults=False):
    """One memory as a user sees it. Times are RFC 3339 in UTC: `2026-01-31T09:30:00.000Z`."""

    id: str
    content: str
    user_id: str | None = None
    agent_id: str | None = None
    app_id: str | None = None
    run_id: str | None = None
    memory_type: MemoryType = "episodic"
    importance: float = 0.5
    categories: list[str] = []
    metadata: dict[str, Any] = {}
    created_at: str
    updated_at: str
    expires_at: str | None = None
    version: Annotated[int, Meta(description="Counts its changes, from 1; also the ETag.")] = 1
    hash: Annotated[str, Meta(description="Equal when the content is.")] = ""

    @property
    def scope(self) -> Scope:
        return Scope(
            user_id=self.user_id, agent_id=self.agent_id, app_id=self.app_id, run_id=self.run_id
        )


class HistoryEntry(msgspec.Struct, kw_only=True):
    """One version of a memory: what it was before and after an event."""

    memory_id: str
    event: HistoryEvent
    version: int
    old_content: str | None = None
    new_content: str | None = None
    at: str
    metadata: dict[str, Any] = {}
