"""docs/http-api.md, made from the route table: `python -m agentmem_node.api.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from agentmem_cluster import errors
from agentmem_cluster.errors import AgentMemError
from agentmem_node.api.openapi import document, errors_by_status, meaning_of
from agentmem_node.api.routes import ROUTES, Route
from agentmem_node.api.routing import MethodNotAllowed

_HEAD = """\
# HTTP API

Made by `python -m agentmem_node.api.reference`; a test keeps it complete. A running node serves
the same as `/openapi.json` (OpenAPI 3.1) and as a page to read and try at `/docs`.

    curl -X POST http://127.0.0.1:7700/api/v1/memories -H 'Content-Type: application/json' \\
         -d '{"content": "Ana drinks oolong tea.", "user_id": "ana"}'
    curl -X POST http://127.0.0.1:7700/api/v1/memories/search -H 'Content-Type: application/json' \\
         -d '{"query": "what does Ana drink?", "user_id": "ana"}'

Any node answers any request. Bodies are JSON in UTF-8; an unknown field or parameter is refused
and named. A slash at the end of a path makes no difference.

## Headers

| Header | Meaning |
|---|---|
| `Authorization: Bearer KEY` | The API key; `Token KEY` and `X-API-Key: KEY` mean the same. A key \
belongs to a tenant. |
| `Idempotency-Key` | On writes: 1 to 255 visible ASCII characters. The same write sent again \
under the same key takes effect once; another one under it is refused with 409. |
| `X-AgentMem-Deadline-Ms` | How long the answer may take, in milliseconds; at most \
`limits.deadline_ms_max`. |
| `X-AgentMem-Token` | In answers: the consistency token, also in the body. In requests: the token \
to read at, with `consistency` `session`. |
| `ETag`, `If-Match`, `If-None-Match` | A memory's version, in quotes: `"3"`. A write with \
`If-Match` is refused with 409 when the version moved; a read with `If-None-Match` is 304 when it \
did not. |
| `X-Request-Id` | Echoed, or made; it stands in the node's log. |
| `Retry-After` | On 429 and 503: seconds. 0: at once. |

A node that needs no API key answers requests for local names only (`localhost`, `127.0.0.1`,
`[::1]`), and none from web pages of other sites.

## Consistency

`linearizable` (the default) sees every write that was acknowledged before the read began.
`session` sees at least what its `token` stands for. `eventual` takes what the replica at hand
has. A write's answer comes when a majority of the shard's replicas has it on disk.

## Filters

`filters` narrows a search or a list before anything is ranked. Members of an object must all
hold; `AND` and `OR` take lists, `NOT` a filter or a list; any other name is a field, with a
value or with operators:

    {"AND": [{"memory_type": {"in": ["factual", "core"]}},
             {"created_at": {"gte": "2026-01-01"}},
             {"NOT": {"categories": {"contains": "work"}}},
             {"metadata.city": "Oslo"}]}

Fields: `id`, `content`, `user_id`, `agent_id`, `app_id`, `run_id`, `created_at`, `updated_at`,
`expires_at`, `memory_type`, `importance`, `categories`, and `metadata.KEY`, nested with dots.
Operators: `eq`, `ne`, `gt`, `gte`, `lt`, `lte`, `in`, `nin`, `contains`, `icontains`, `exists`.

## Errors

Every error is `{"detail": ..., "error": ..., "code": ..., "details": {...}}`. `detail` and
`error` hold the same text, which says what is wrong, why, and what to do; `code` never changes.

| Code | Status | Meaning |
|---|---|---|
"""


def markdown() -> str:
    lines = [_HEAD.rstrip("\n")]
    lines += [
        f"| `{kind.code}` | {kind.status} | {meaning_of(kind)} |"
        for kind in sorted(_kinds(), key=lambda kind: (kind.status, kind.code))
    ]
    spec = document()
    for tag in spec["tags"]:
        lines += ["", f"## {tag['name'].capitalize()}", "", tag["description"]]
        for route in ROUTES:
            if route.tag == tag["name"]:
                lines += _route(route, spec)
    schemas = spec["components"]["schemas"]
    shown = {route.body.type.__name__ for route in ROUTES if route.body is not None}
    shown |= {route.query.type.__name__ for route in ROUTES}
    shown |= {route.answer.__name__ for route in ROUTES if route.answer is not None}
    lines += ["", "## Types", "", "What stands inside of bodies and answers."]
    for name in sorted(set(schemas) - shown):
        lines += ["", f"### {name}", ""]
        if "description" in schemas[name]:
            lines += [schemas[name]["description"].strip().split("\n\n")[0], ""]
        lines += _fields(schemas[name])
    return "\n".join(lines) + "\n"


def _kinds() -> list[type[AgentMemError]]:
    """The tree, one class for each code."""
    found: dict[str, type[AgentMemError]] = {}
    for kind in (*vars(errors).values(), MethodNotAllowed):
        if isinstance(kind, type) and issubclass(kind, AgentMemError):
            found.setdefault(kind.code, kind)
    return list(found.values())


def _route(route: Route, spec: dict[str, Any]) -> Iterator[str]:
    operation = spec["paths"][route.path][route.method.lower()]
    yield from ("", f"### {route.method} {route.path}", "", f"{route.summary}.")
    if route.description:
        yield from ("", route.description)
    if route.is_open:
        yield from ("", "Needs no API key.")
    if route.needs_admin:
        yield from ("", "Needs an API key with `admin = true`, where there are keys.")
    if route.body is not None:
        yield from ("", "Body:", "", "    " + msgspec.json.encode(route.example).decode(), "")
        yield from _fields(spec["components"]["schemas"][route.body.type.__name__])
    query = [p for p in operation.get("parameters", ()) if p["in"] == "query"]
    if query:
        yield from ("", "Parameters:", "")
        yield from _fields(spec["components"]["schemas"][route.query.type.__name__])
    if route.answer is not None:
        yield from ("", f"Answer ({route.status}):", "")
        yield from _fields(spec["components"]["schemas"][route.answer.__name__])
    for status, meaning in route.further_statuses:
        yield from ("", f"{status}: {meaning}")
    refusals = [
        f"{status} " + ", ".join(f"`{kind.code}`" for kind in kinds)
        for status, kinds in errors_by_status(route).items()
    ]
    if refusals:
        yield from ("", f"Errors: {'; '.join(refusals)}.")


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    for name, field in schema["properties"].items():
        needed = " (required)" if name in schema.get("required", ()) else ""
        text = f"- `{name}`: {_type(field)}{needed}"
        if field.get("default") not in (None, [], {}):
            text += f", default `{msgspec.json.encode(field['default']).decode()}`"
        meaning = field.get("description") or next(
            (part["description"] for part in field.get("anyOf", ()) if "description" in part), ""
        )
        yield f"{text}. {meaning}".rstrip()


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if schema.get("type") == "object" and isinstance(values, dict) and values:
        return f"object of {_type(values)}"
    bounds = [
        f"{word} {schema[name]}"
        for name, word in (
            ("minimum", "from"),
            ("maximum", "to"),
            ("minLength", "of at least"),
            ("maxLength", "at most"),
        )
        if name in schema
    ]
    unit = " characters" if "minLength" in schema or "maxLength" in schema else ""
    return " ".join([str(schema.get("type", "any")), *bounds]) + (unit if bounds else "")


if __name__ == "__main__":
    sys.stdout.write(markdown())
