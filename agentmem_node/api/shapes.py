"""Query parameters, and the answers as they look to a client.

The service answers with stored JSON inside (`msgspec.Raw`), which a schema cannot describe: the
types here are what those answers are. A test decodes every real answer with them, strictly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agentmem_node.model import operations as ops
from agentmem_node.model import requests as rq
from agentmem_node.model.memory import Memory
from agentmem_node.model.search import Consistency
from agentmem_node.service import join_messages as jm

Token = Annotated[
    str,
    Meta(
        description="Stands for the shards and positions that this answer reflects. With "
        '`consistency: "session"` a later read, on any node, sees at least as much.'
    ),
]


class NoQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The route takes no parameters."""


class GetQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How fresh the answer must be."""

    consistency: Consistency = "linearizable"
    token: str | None = None


class DeleteQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`expected_version` does what If-Match does."""

    expected_version: Annotated[int, Meta(ge=1)] | None = None


class ErrorBody(msgspec.Struct, kw_only=True):
    """Every error. `detail` and `error` hold the same text; `code` is stable."""

    detail: Annotated[str, Meta(description="What is wrong, why, and what to do.")]
    error: Annotated[str, Meta(description="The same as `detail`.")]
    code: Annotated[str, Meta(description="For programs: it never changes.")]
    details: dict[str, Any] | UnsetType = UNSET


class AddedMemory(msgspec.Struct, kw_only=True):
    """One item of an add: the memory as stored, or why it was refused."""

    event: Literal["ADD", "ERROR"]
    id: str | UnsetType = UNSET
    memory: Memory | UnsetType = UNSET
    error: rq.ItemError | UnsetType = UNSET


class AddResults(msgspec.Struct, kw_only=True):
    results: list[AddedMemory]
    token: Token


class OneMemory(msgspec.Struct, kw_only=True):
    """One memory. The ETag header carries its version too."""

    memory: Memory
    version: int
    token: Token


class MemoryPage(msgspec.Struct, kw_only=True):
    """Newest first. `next_cursor` continues; null: that was all."""

    results: list[Memory]
    next_cursor: str | None
    partial: Annotated[list[str], Meta(description="Shards that did not answer in time.")]
    token: Token


class LegReport(msgspec.Struct, kw_only=True):
    """What one engine said of a result."""

    rank: Annotated[int, Meta(description="Its place in the engine's own list, from 1.")]
    score: Annotated[float, Meta(description="The engine's own score.")]
    weight: float
    contribution: Annotated[float, Meta(description="What it added to the final score.")]


class FoundMemory(Memory, kw_only=True):
    """A memory that a search found. `legs` is there when the search asked to `explain`."""

    score: float
    legs: dict[str, LegReport] | UnsetType = UNSET


class SearchResults(msgspec.Struct, kw_only=True):
    """Best first."""

    results: list[FoundMemory]
    partial: Annotated[
        list[str],
        Meta(description="Shards that did not answer in time: results may be missing."),
    ]
    token: Token
    next_cursor: str | None
    took_ms: float
    details: dict[str, Any] | UnsetType = UNSET


class SearchBatchResults(msgspec.Struct, kw_only=True):
    """One answer for each search, in their order."""

    results: list[SearchResults]


class ClusterNode(msgspec.Struct, kw_only=True):
    http: Annotated[str, Meta(description="URL of the node's HTTP API.")]
    state: Annotated[
        str,
        Meta(description="`active`, or `draining`: it gives its replicas away and gets no more."),
    ] = "active"
    zone: Annotated[
        str, Meta(description="Where it stands; replicas of a shard are spread over zones.")
    ] = ""


class ClusterShard(msgspec.Struct, kw_only=True):
    epoch: int
    members: list[str]
    leader: str | None
    slots: Annotated[list[list[int]], Meta(description="Ranges [first, last] of slots.")]


class ClusterView(msgspec.Struct, kw_only=True):
    """The cluster as this node sees it; there may be more fields."""

    version: Annotated[int, Meta(description="Version of the shard map.")]
    tenant: str
    nodes: dict[str, ClusterNode]
    shards: dict[str, ClusterShard]


class JoinTokenList(msgspec.Struct, kw_only=True):
    """The one that ends last comes first."""

    tokens: list[jm.JoinTokenKept]


class OperationList(msgspec.Struct, kw_only=True):
    """Newest first."""

    operations: list[ops.Operation]


class CheckResult(msgspec.Struct, kw_only=True):
    """`ok`: every finding is."""

    ok: bool
    findings: list[ops.Finding]


class Liveness(msgspec.Struct, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, kw_only=True):
    """Whether this node should get requests; `reasons` tells what it waits for."""

    status: Literal["ready", "not_ready", "shutting_down"]
    reasons: dict[str, Any]
