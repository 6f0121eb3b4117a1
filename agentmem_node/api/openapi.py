"""/openapi.json, made from the route table and the types that validate."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import msgspec

from agentmem_cluster.errors import AgentMemError
from agentmem_node.api.routes import ROUTES, Route
from agentmem_node.api.shapes import ErrorBody

_REF = "#/components/schemas/{name}"
_TOKEN_HEADER = {
    "description": "The consistency token of the answer.",
    "schema": {"type": "string"},
}
_TAGS = (
    ("memories", "What is remembered."),
    ("search", "Finding it again: by meaning, words, phrases, typos, time and importance."),
    ("backups", "A copy of everything, and the way back; for operators."),
    ("operations", "Running a node."),
    (
        "cluster",
        "Changing a cluster: who holds which shard. Where there are API keys, it takes one that "
        "has `admin = true` under `security.api_keys`.",
    ),
)


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    types = _types()
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(
            route, schema_of, components
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AgentMem",
            "version": "v1",
            "summary": "The memory of AI agents, kept by a cluster.",
            "description": "Every error is `{detail, error, code, details}`; 429 and 503 carry "
            "Retry-After. Any node answers any request.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS],
        "security": [{"bearer": []}, {"apiKey": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def document_json() -> bytes:
    return msgspec.json.encode(document())


def _types() -> list[Any]:
    types: list[Any] = [ErrorBody]
    for route in ROUTES:
        if route.body is not None:
            types.append(route.body.type)
        if route.answer is not None:
            types.append(route.answer)
        types.append(route.query.type)
    return list(dict.fromkeys(types))


def _operation(
    route: Route, schema_of: dict[Any, dict[str, Any]], components: dict[str, Any]
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [route.tag],
    }
    if route.description:
        operation["description"] = route.description
    if route.is_open:
        operation["security"] = []
    parameters = [*_parameters(route, components), *_headers(route)]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content: dict[str, Any] = {"schema": schema_of[route.body.type]}
        if route.example is not None:
            content["example"] = route.example
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    operation["responses"] = _responses(route, schema_of)
    return operation


def _parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": route.id_meaning,
            "schema": {"type": "string", "format": "uuid"}
            if "UUID" in route.id_meaning
            else {"type": "string"},
        }
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    schema = components[route.query.type.__name__]
    for name, field in schema["properties"].items():
        parameter = {"name": name, "in": "query", "required": name in schema.get("required", ())}
        if route.query.is_json(name):
            parameter["content"] = {"application/json": {"schema": field}}
        else:
            parameter["schema"] = field
        parameters.append(parameter)
    return parameters


def _headers(route: Route) -> list[dict[str, Any]]:
    text: dict[str, Any] = {"type": "string"}
    headers: list[tuple[str, str, dict[str, Any]]] = []
    if route.kind != "free":
        headers.append(
            (
                "X-AgentMem-Deadline-Ms",
                "How long the answer may take. Bounded by limits.deadline_ms_max.",
                {"type": "integer", "minimum": 1},
            )
        )
    if route.takes_idempotency_key:
        headers.append(
            (
                "Idempotency-Key",
                "1 to 255 visible ASCII characters. A write that is sent again under the same "
                "key takes effect once.",
                {"type": "string", "pattern": "^[!-~]{1,255}$"},
            )
        )
    if route.is_write and "{id}" in route.path:
        headers.append(("If-Match", "The ETag of the version to change; 409 if it moved.", text))
    if route.name == "get":
        headers.append(("If-None-Match", "An ETag; 304 when it is still current.", text))
    return [
        {"name": name, "in": "header", "required": False, "description": meaning, "schema": schema}
        for name, meaning, schema in headers
    ]


def _responses(route: Route, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    schema = {"type": "string"} if route.answer is None else schema_of[route.answer]
    if route.answer is None and route.content_type == "application/json":
        schema = {"type": "object"}
    success: dict[str, Any] = {
        "description": HTTPStatus(route.status).phrase,
        "content": {route.content_type.partition(";")[0]: {"schema": schema}},
    }
    if route.kind not in ("admin", "free"):
        success["headers"] = {"X-AgentMem-Token": _TOKEN_HEADER}
    responses = {str(route.status): success}
    for status, meaning in route.further_statuses:
        responses[str(status)] = {"description": meaning}
    for status, kinds in errors_by_status(route).items():
        responses.setdefault(
            str(status),
            {
                "description": "; ".join(f"`{kind.code}`: {meaning_of(kind)}" for kind in kinds),
                "content": {"application/json": {"schema": schema_of[ErrorBody]}},
            },
        )
    return responses


def errors_by_status(route: Route) -> dict[int, list[type[AgentMemError]]]:
    """The route's errors, by HTTP status."""
    grouped: dict[int, list[type[AgentMemError]]] = {}
    for kind in dict.fromkeys(route.errors):
        grouped.setdefault(kind.status, []).append(kind)
    return dict(sorted(grouped.items()))


_MEANINGS = {
    "bad_request": "the request is wrong",
    "invalid_field": "a field or parameter is wrong; `details.field` names it",
    "invalid_filter": "the filter is wrong",
    "invalid_cursor": "the cursor was not made by this API, or for another request",
    "too_large": "over a limit, which the text names",
    "unauthorized": "no API key, or an unknown one",
    "forbidden": "the caller may not do this",
    "not_found": "there is no such memory, shard, node or operation",
    "method_not_allowed": "the path exists, but not for this method; `Allow` lists which do",
    "conflict": "the version moved, the Idempotency-Key was used for another request, or the "
    "cluster is in no state for that operation",
    "overloaded": "too much at once; retry after a moment",
    "unavailable": "this node cannot answer now",
    "not_leader": "the shard's leader changes; retry",
    "wrong_shard": "the shard map changed; fetch it again",
    "map_moved": "shards were cut or moved while the request was under way; send it again",
    "no_quorum": "too few replicas can be reached; nothing is guessed",
    "disk_full": "writes are refused for want of disk; reads go on",
    "state_damaged": "what was asked for has rotted on this node; another has it, retry",
    "model_unavailable": "there is no embedding model",
    "shutting_down": "this node stops; ask another",
    "deadline_exceeded": "no answer in time; a write may have taken effect: repeat it with its "
    "Idempotency-Key",
    "internal": "a bug; quote the X-Request-Id",
    "backup_destination": "backups cannot be kept there",
    "backup_unreachable": "the place of the backups does not answer",
    "backup_missing": "there is no such backup, or no such work on this node",
}


def meaning_of(kind: type[AgentMemError]) -> str:
    """What an error means, in a few words."""
    return _MEANINGS[kind.code]
