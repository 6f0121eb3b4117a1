"""The route table: what the API offers. Dispatch and all documentation come from it.

Mem0's routes will be further entries of it.
"""

from __future__ import annotations

from agentmem_cluster.errors import (
    BadRequest,
    Conflict,
    DiskFull,
    InvalidCursor,
    InvalidFilter,
    ModelUnavailable,
    NotFound,
    TooLarge,
)
from agentmem_node.api import memories, operations, shapes
from agentmem_node.api.admin_routes import ADMIN_ROUTES
from agentmem_node.api.backup_routes import BACKUP_ROUTES
from agentmem_node.api.decoding import BatchAddBody
from agentmem_node.api.join_routes import JOIN_ROUTES
from agentmem_node.api.route import BASE, Errors, Route
from agentmem_node.api.route import READ as _READ
from agentmem_node.api.route import WRITE as _WRITE
from agentmem_node.api.route import make_route as _route
from agentmem_node.model import requests as rq

__all__ = ["BASE", "ROUTES", "Route"]

_TEXT: Errors = (ModelUnavailable,)

_ONE_OF_MANY = (
    "A bad item is refused alone, in its place of `results`, and the others take effect. A batch "
    "that spans shards is one write on each of them: on an error, send it again with the same "
    "Idempotency-Key, and what took effect stays as it is."
)
_UNCHANGED = ((304, "If-None-Match names the current version."),)

ROUTES: tuple[Route, ...] = (
    _route(
        "POST",
        f"{BASE}/memories",
        memories.add,
        "write",
        "Add a memory",
        description="Give `content`, or `messages` of a conversation (each becomes a memory, "
        "system messages do not), and at least one of user_id, agent_id, app_id, run_id. The "
        "answer comes when a majority of the shard's replicas has it on disk; every leg of "
        "search finds it from then on.",
        tag="memories",
        body=rq.AddRequest,
        answer=shapes.AddResults,
        status=201,
        errors=(*_WRITE, *_TEXT, Conflict),
        example={
            "content": "Ana drinks oolong tea in the afternoon.",
            "user_id": "ana",
            "metadata": {"source": "chat"},
        },
    ),
    _route(
        "GET",
        f"{BASE}/memories",
        memories.list_page,
        "read",
        "List memories, newest first",
        description="`filters` is a URL-encoded JSON object, as in a search.",
        tag="memories",
        query=rq.ListQuery,
        answer=shapes.MemoryPage,
        errors=(*_READ, InvalidFilter, InvalidCursor),
    ),
    _route(
        "POST",
        f"{BASE}/memories/batch",
        memories.add_batch,
        "write",
        "Add many memories",
        description=_ONE_OF_MANY,
        tag="memories",
        body=BatchAddBody(),
        answer=shapes.AddResults,
        errors=(*_WRITE, *_TEXT, Conflict),
        example={
            "memories": [
                {"content": "Ana moved to Oslo.", "user_id": "ana"},
                {"content": "Ben is allergic to nuts.", "user_id": "ben", "importance": 0.9},
            ]
        },
    ),
    _route(
        "POST",
        f"{BASE}/memories/batch/delete",
        memories.delete_batch,
        "write",
        "Delete many memories",
        description=_ONE_OF_MANY,
        tag="memories",
        body=rq.BatchDeleteRequest,
        answer=rq.DeleteAnswer,
        errors=(*_WRITE, Conflict),
        example={"ids": ["0197a9c2-0c4e-8abc-8def-0123456789ab"]},
    ),
    _route(
        "POST",
        f"{BASE}/memories/search",
        memories.search,
        "search",
        "Search memories",
        description="Give `query` and/or `vector`. A search that names a user_id asks one shard, "
        "any other asks all. `legs` chooses and weighs the engines, as a list or as weights. "
        "`partial` names shards that did not answer.",
        tag="search",
        body=rq.SearchRequest,
        answer=shapes.SearchResults,
        errors=(*_READ, TooLarge, InvalidFilter, InvalidCursor, *_TEXT),
        example={"query": "what does Ana drink?", "user_id": "ana", "top_k": 5, "explain": True},
    ),
    _route(
        "POST",
        f"{BASE}/memories/search/batch",
        memories.search_batch,
        "search",
        "Run many searches",
        description="Answers come in the order of the searches. The first that cannot be "
        "answered fails the request, and the error names it.",
        tag="search",
        body=rq.SearchBatchRequest,
        answer=shapes.SearchBatchResults,
        errors=(*_READ, TooLarge, InvalidFilter, InvalidCursor, *_TEXT),
        example={"searches": [{"query": "tea", "user_id": "ana"}, {"query": "nuts"}]},
    ),
    _route(
        "GET",
        f"{BASE}/memories/{{id}}",
        memories.get,
        "read",
        "Get a memory",
        description="The ETag is the version; with If-None-Match an unchanged memory is 304.",
        tag="memories",
        query=shapes.GetQuery,
        answer=shapes.OneMemory,
        further_statuses=_UNCHANGED,
        errors=(*_READ, NotFound),
    ),
    _route(
        "PATCH",
        f"{BASE}/memories/{{id}}",
        memories.update,
        "write",
        "Change a memory",
        description="Only the given fields change; `expires_at: null` clears it. With If-Match "
        "(the ETag) or `expected_version`, 409 when somebody changed the memory meanwhile.",
        tag="memories",
        body=rq.UpdateRequest,
        answer=shapes.OneMemory,
        errors=(*_WRITE, *_TEXT, NotFound, Conflict),
        example={"content": "Ana drinks green tea now.", "expected_version": 1},
    ),
    _route(
        "DELETE",
        f"{BASE}/memories/{{id}}",
        memories.delete,
        "write",
        "Delete a memory",
        description="With If-Match or `expected_version`, 409 when the memory was changed.",
        tag="memories",
        query=shapes.DeleteQuery,
        answer=rq.DeleteAnswer,
        errors=(BadRequest, DiskFull, *_READ, NotFound, Conflict),
    ),
    _route(
        "GET",
        f"{BASE}/memories/{{id}}/history",
        memories.history,
        "read",
        "Every version of a memory",
        description="Oldest first, its deletion included.",
        tag="memories",
        answer=rq.HistoryAnswer,
        errors=(*_READ, NotFound),
    ),
    _route(
        "GET",
        f"{BASE}/cluster",
        operations.cluster,
        "free",
        "The cluster as this node sees it",
        description="Nodes, the shard map, leaders. A client that knows it sends each request "
        "to the right node.",
        tag="operations",
        answer=shapes.ClusterView,
    ),
    *ADMIN_ROUTES,
    *BACKUP_ROUTES,
    *JOIN_ROUTES,
    _route(
        "GET",
        "/health/live",
        operations.live,
        "free",
        "Is the process alive?",
        description="For restarts: 200 as long as the event loop turns.",
        tag="operations",
        answer=shapes.Liveness,
        is_open=True,
    ),
    _route(
        "GET",
        "/health/ready",
        operations.ready,
        "free",
        "Should this node get requests?",
        description="200 when every shard group here knows its leader and has caught up.",
        tag="operations",
        answer=shapes.Readiness,
        further_statuses=((503, "Not now; `reasons` says what for."),),
        is_open=True,
    ),
    _route(
        "GET",
        "/metrics",
        operations.metrics,
        "free",
        "Metrics, for Prometheus",
        description="The node's series, and the series of the key's own tenant.",
        tag="operations",
        content_type="text/plain; version=1.0.0; charset=utf-8",
    ),
    _route(
        "GET",
        "/openapi.json",
        operations.openapi,
        "free",
        "This API as an OpenAPI 3.1 document",
        tag="operations",
        is_open=True,
    ),
    _route(
        "GET",
        "/docs",
        operations.docs,
        "free",
        "This API as a page to read and try",
        tag="operations",
        content_type="text/html; charset=utf-8",
        is_open=True,
    ),
    _route(
        "GET",
        "/docs/docs.js",
        operations.docs_script,
        "free",
        "The page's script",
        tag="operations",
        content_type="text/javascript; charset=utf-8",
        is_open=True,
    ),
    _route(
        "GET",
        "/docs/docs.css",
        operations.docs_style,
        "free",
        "The page's style",
        tag="operations",
        content_type="text/css; charset=utf-8",
        is_open=True,
    ),
)
