"""API keys, tenants, and web pages of strangers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., None]
KEY_ANA, KEY_BEN = "am_" + "a" * 52, "am_" + "b" * 52
KEYS = {KEY_ANA: "ana", KEY_BEN: "ben"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY_ANA}"},
        {"Authorization": f"Token {KEY_ANA}"},
        {"Authorization": f"bearer   {KEY_ANA}"},
        {"X-API-Key": KEY_ANA},
        {"X-API-Key": KEY_ANA, "Authorization": f"Bearer {KEY_ANA}"},
    ],
)
def test_a_key_is_taken_in_every_usual_header(run: Run, headers: dict[str, str]) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.ask("GET", "/api/v1/memories", None, headers)
        assert answer.status == 200
        caller = node.service.calls[-1][1]
        assert (caller.tenant, caller.key_id) == ("ana", "ana")

    run(scenario, keys=KEYS)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer am_wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY_ANA}"},
        {"Authorization": KEY_ANA},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 5000},
        {"X-API-Key": KEY_ANA, "Authorization": f"Bearer {KEY_BEN}"},
        {"X-API-Key": KEY_ANA.upper()},
    ],
)
def test_without_a_good_key_the_answer_is_401_and_nothing_happens(
    run: Run, headers: dict[str, str]
) -> None:
    async def scenario(node: Any) -> None:
        for method, path in (
            ("GET", "/api/v1/memories"),
            ("POST", "/api/v1/memories"),
            ("GET", "/api/v1/cluster"),
            ("GET", "/metrics"),
        ):
            answer = await node.ask(method, path, None, headers)
            assert (answer.status, answer.json["code"]) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert "Authorization" in answer.json["detail"]
            assert KEY_ANA not in answer.body.decode()
        assert node.service.calls == []

    run(scenario, keys=KEYS)


def test_health_and_the_documentation_need_no_key(run: Run) -> None:
    async def scenario(node: Any) -> None:
        for path in ("/health/live", "/health/ready", "/openapi.json", "/docs", "/docs/docs.js"):
            assert (await node.ask("GET", path)).status == 200

    run(scenario, keys=KEYS)


def test_a_tenant_sees_its_own_memories_only(run: Run) -> None:
    async def scenario(node: Any) -> None:
        added = await node.post("/memories", {"content": "a", "user_id": "u"}, X_API_Key=KEY_ANA)
        path = f"/memories/{added.json['results'][0]['id']}"
        assert (await node.get(path, X_API_Key=KEY_ANA)).status == 200
        assert (await node.get(path, X_API_Key=KEY_BEN)).status == 404
        assert (await node.get("/cluster", X_API_Key=KEY_BEN)).json["tenant"] == "ben"

    run(scenario, keys=KEYS)


def test_without_keys_everybody_is_the_default_tenant_but_a_wrong_key_is_refused(
    run: Run,
) -> None:
    async def scenario(node: Any) -> None:
        await node.get("/memories")
        assert node.service.calls[-1][1].tenant == "default"
        assert (await node.get("/memories", X_API_Key=KEY_ANA)).status == 401

    run(scenario)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:7700"}, 200),
        ({"Host": "127.0.0.9:7700"}, 200),
        ({"Host": "[::1]:7700"}, 200),
        ({"Host": "localhost:7700", "Origin": "http://localhost:7700"}, 200),
        ({"Host": "rebound.example:7700"}, 403),
        ({"Host": "localhost.example"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Host": "localhost:7700", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:7700", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:7700", "Origin": "null"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_a_keyless_node_answers_local_programs_and_not_strange_web_pages(
    run: Run, headers: dict[str, str], status: int
) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.ask("POST", "/api/v1/memories/search", {"query": "a"}, headers)
        assert answer.status == status
        if status == 403:
            assert answer.json["code"] == "forbidden"
            assert node.service.calls == []

    run(scenario)


def test_a_node_with_keys_may_have_any_name(run: Run) -> None:
    async def scenario(node: Any) -> None:
        headers = {"Host": "memory.example", "Origin": "https://app.example", "X-API-Key": KEY_ANA}
        assert (await node.ask("GET", "/api/v1/memories", None, headers)).status == 200

    run(scenario, keys=KEYS)
