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
_Id = Meta(min_length=1, max_length=256)
UserId = Annotated[str, _Id, Meta(description="Whose memory it is: the owner, when given.")]
AgentId = Annotated[str, _Id, Meta(description="The agent that it belongs to.")]
AppId = Annotated[str, _Id, Meta(description="The application that it belongs to.")]
RunId = Annotated[str, _Id, Meta(description="The conversation or run that it belongs to.")]
Content = Annotated[str, Meta(description="The text to remember.")]
Metadata = Annotated[
    dict[str, Any], Meta(description="Anything of your own, as JSON; `filters` can ask for it.")
]
Categories = Annotated[list[str], Meta(description="Labels, for `filters`.")]
Expiry = Annotated[
    str,
    Meta(
        description="From this time on (RFC 3339) nothing finds the memory any more; "
        "a time that has passed hides it at once."
    ),
]
Vector = Annotated[
    list[float],
    Meta(
        description="The text's embedding by the cluster's model; it need not be normalised. "
        "Without it the node embeds the text."
    ),
]
Filters = Annotated[
    dict[str, Any],
    Meta(description="Which memories to look at: conditions on their fields, before ranking."),
]
Cursor = Annotated[str, Meta(description="`next_cursor` of the last answer: what follows it.")]
SessionToken = Annotated[
    str, Meta(description="With `consistency: session`: see at least what this token stands for.")
]
Freshness = Annotated[
    Consistency,
    Meta(
        description="`linearizable`: every write acknowledged before. `session`: at least what "
        "`token` stands for. `eventual`: what the replica at hand has."
    ),
]


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One message of a conversation; what the system says is not remembered."""

    role: Literal["user", "assistant", "system", "tool"]
    content: Content
    name: str | None = None


class AddRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`content` or `messages`, and at least one scope id."""

    content: Content | None = None
    messages: list[Message] | None = None
    user_id: UserId | None = None
    agent_id: AgentId | None = None
    app_id: AppId | None = None
    run_id: RunId | None = None
    metadata: Metadata = {}
    memory_type: MemoryType = "episodic"
    importance: Importance | None = None
    categories: Categories = []
    created_at: (
        Annotated[str, Meta(description="Back-dates it (RFC 3339). Default: now.")] | None
    ) = None
    expires_at: Expiry | None = None
    vector: Vector | None = None
    infer: Annotated[bool, Meta(description="Have facts extracted; not in this version.")] = False


class BatchAddRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    memories: Annotated[
        list[AddRequest], Meta(description="At most limits.batch_items_max of them.")
    ]


class ItemError(msgspec.Struct, kw_only=True):
    """Why one item was refused: as in the answer to a request that fails as a whole."""

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

    content: Content | msgspec.UnsetType = msgspec.UNSET
    metadata: Metadata | msgspec.UnsetType = msgspec.UNSET
    memory_type: MemoryType | msgspec.UnsetType = msgspec.UNSET
    importance: Importance | msgspec.UnsetType = msgspec.UNSET
    categories: Categories | msgspec.UnsetType = msgspec.UNSET
    expires_at: Expiry | msgspec.UnsetType | None = msgspec.UNSET
    vector: Vector | msgspec.UnsetType = msgspec.UNSET
    expected_version: (
        Annotated[
            int, Meta(ge=1, description="Refuse with 409 unless this is the current version.")
        ]
        | None
    ) = None


class BatchDeleteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    ids: Annotated[list[str], Meta(description="At most limits.batch_items_max of them.")]


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

    query: Annotated[str, Meta(description="What to look for, in plain words.")] | None = None
    vector: Vector | None = None
    user_id: UserId | None = None
    agent_id: AgentId | None = None
    app_id: AppId | None = None
    run_id: RunId | None = None
    filters: Filters | None = None
    legs: (
        Annotated[
            dict[LegName, float] | list[LegName],
            Meta(
                description="The engines to ask: a list, or with weights. Default: all that apply."
            ),
        ]
        | None
    ) = None
    top_k: Annotated[int, Meta(ge=1, description="How many results; at most limits.top_k_max.")] = (
        10
    )
    threshold: (
        Annotated[float, Meta(ge=0.0, le=1.0, description="Leave out results that score less.")]
        | None
    ) = None
    fusion: Annotated[
        Fusion,
        Meta(
            description="How the engines' lists become one: by weighted scores, or by "
            "Reciprocal Rank Fusion."
        ),
    ] = "weighted"
    consistency: Freshness = "linearizable"
    token: SessionToken | None = None
    explain: Annotated[bool, Meta(description="Tell what each engine said of each result.")] = False
    cursor: Cursor | None = None


class SearchBatchRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    searches: Annotated[
        list[SearchRequest], Meta(description="At most limits.search_batch_max of them.")
    ]


class ListQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """GET /memories: newest first."""

    user_id: UserId | None = None
    agent_id: AgentId | None = None
    app_id: AppId | None = None
    run_id: RunId | None = None
    filters: Filters | None = None
    limit: Annotated[
        int, Meta(ge=1, description="Memories in a page; at most limits.page_items_max.")
    ] = 100
    cursor: Cursor | None = None
    consistency: Freshness = "linearizable"
    token: SessionToken | None = None


class ListAnswer(msgspec.Struct, kw_only=True):
    results: list[msgspec.Raw]
    next_cursor: str | None
    partial: list[str]
    token: str


class HistoryAnswer(msgspec.Struct, kw_only=True):
    results: list[HistoryEntry]
    token: str
