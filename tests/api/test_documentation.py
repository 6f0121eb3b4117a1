"""What is documented is what is there: /openapi.json, /docs, docs/http-api.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentmem_cluster import errors
from agentmem_node.api.openapi import document, document_json
from agentmem_node.api.reference import markdown
from agentmem_node.api.routes import ROUTES, Route
from agentmem_node.model import requests as rq

Run = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "agentmem_node" / "api"
by_name = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(part) for part in value.values()))
    if isinstance(value, list):
        return set().union(*(references(part) for part in value))
    return set()


def test_the_openapi_document_is_whole() -> None:
    spec = msgspec.json.decode(document_json())
    assert spec["openapi"] == "3.1.0"
    schemas = {f"#/components/schemas/{name}" for name in spec["components"]["schemas"]}
    assert references(spec) <= schemas
    names = [
        operation["operationId"] for path in spec["paths"].values() for operation in path.values()
    ]
    assert len(names) == len(set(names)) == len(ROUTES)
    tags = {tag["name"] for tag in spec["tags"]}
    for path, methods in spec["paths"].items():
        for operation in methods.values():
            assert set(operation["tags"]) <= tags
            in_path = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path))
            assert all(re.fullmatch(r"[2345]\d\d", status) for status in operation["responses"])


@by_name
def test_each_route_documents_its_types_and_errors(route: Route) -> None:
    operation = document()["paths"][route.path][route.method.lower()]
    assert operation["summary"] == route.summary
    assert ("requestBody" in operation) == (route.body is not None)
    parameters = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"}
    assert parameters == set(route.query.type.__struct_fields__)
    for error in route.errors:
        assert error.code in operation["responses"][str(error.status)]["description"]


@by_name
def test_each_example_is_a_valid_body(route: Route) -> None:
    assert (route.example is not None) == (route.body is not None)
    if route.body is not None:
        route.body.decode(msgspec.json.encode(route.example))


def test_the_limits_of_fields_are_in_the_schemas() -> None:
    schemas = document()["components"]["schemas"]
    assert schemas["SearchRequest"]["additionalProperties"] is False
    assert schemas["SearchRequest"]["properties"]["top_k"]["minimum"] == 1
    assert "fuzzy" in str(schemas["SearchRequest"]["properties"]["legs"])
    assert set(schemas["AddRequest"]["properties"]) == set(rq.AddRequest.__struct_fields__)


def test_the_node_serves_its_documentation_without_a_network(run: Run) -> None:
    async def scenario(node: Any) -> None:
        served = await node.ask("GET", "/openapi.json")
        assert served.json == msgspec.json.decode(document_json())
        page = await node.ask("GET", "/docs")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        wanted = re.findall(r'(?:src|href)="(/[^"]+)"', page.body.decode())
        assert len(wanted) >= 3
        for path in wanted:
            assert (await node.ask("GET", path)).status == 200

    run(scenario)


@pytest.mark.parametrize("name", ["docs.html", "docs.js", "docs.css"])
def test_the_page_takes_nothing_from_elsewhere(name: str) -> None:
    text = (API / name).read_text()
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]+", text) == []
    assert "innerHTML" not in text
    assert "eval(" not in text


def test_docs_http_api_is_made_from_the_routes() -> None:
    assert (ROOT / "docs" / "http-api.md").read_text() == markdown(), (
        "run: python -m agentmem_node.api.reference > docs/http-api.md"
    )


@by_name
def test_docs_http_api_has_a_heading_for_each_route(route: Route) -> None:
    assert f"\n### {route.method} {route.path}\n" in (ROOT / "docs" / "http-api.md").read_text()


def test_docs_http_api_explains_every_error_code() -> None:
    text = (ROOT / "docs" / "http-api.md").read_text()
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.AgentMemError):
            assert f"| `{kind.code}` | {kind.status} |" in text, kind
