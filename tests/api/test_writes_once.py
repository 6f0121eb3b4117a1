"""Idempotency keys, versions and request ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

Run = Callable[..., None]
KEY_ANA, KEY_BEN = "am_" + "a" * 52, "am_" + "b" * 52
MEMORY = {"content": "a", "user_id": "u"}


def test_the_same_key_is_the_same_write_and_of_one_tenant_only(run: Run) -> None:
    async def scenario(node: Any) -> None:
        for key, api_key in (("k1", KEY_ANA), ("k1", KEY_ANA), ("k2", KEY_ANA), ("k1", KEY_BEN)):
            await node.post("/memories", MEMORY, Idempotency_Key=key, X_API_Key=api_key)
        ids = [caller.request_id for _, caller in node.service.calls]
        assert ids[0] == ids[1]
        assert len(set(ids)) == 3
        assert {len(one) for one in ids} == {16}

    run(scenario, keys={KEY_ANA: "ana", KEY_BEN: "ben"})


def test_the_fingerprint_tells_another_body_path_or_version(run: Run) -> None:
    async def scenario(node: Any) -> None:
        memory_id = await node.add()
        path = f"/api/v1/memories/{memory_id}"
        first, other = {"content": "b"}, {"content": "c"}
        for method, target, body, tag in (
            ("PATCH", path, first, '"1"'),
            ("PATCH", path, first, '"1"'),
            ("PATCH", path, other, '"1"'),
            ("PATCH", path, first, '"2"'),
            ("DELETE", path, None, '"1"'),
            ("POST", "/api/v1/memories", first, '"1"'),
        ):
            await node.ask(method, target, body, {"If-Match": tag, "Idempotency-Key": "k"})
        prints = [caller.fingerprint for _, caller in node.service.calls[1:]]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 5
        assert {len(one) for one in prints} == {8}

    run(scenario)


def test_without_a_key_no_request_id_is_invented(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.add()
        assert node.service.calls[-1][1].request_id is None

    run(scenario)


def test_a_lost_race_is_409(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"/api/v1/memories/{await node.add()}"
        won = await node.ask("PATCH", path, {"content": "b"}, {"If-Match": '"1"'})
        assert (won.status, won.headers["ETag"]) == (200, '"2"')
        lost = await node.ask("PATCH", path, {"content": "c"}, {"If-Match": '"1"'})
        assert (lost.status, lost.json["code"]) == (409, "conflict")
        by_field = await node.ask("PATCH", path, {"content": "c", "expected_version": 1})
        assert by_field.status == 409
        assert (await node.ask("DELETE", f"{path}?expected_version=1")).status == 409
        assert (await node.ask("DELETE", path, None, {"If-Match": '"2"'})).status == 200

    run(scenario)


def test_if_match_and_expected_version_must_agree(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"/api/v1/memories/{await node.add()}"
        body = {"content": "b", "expected_version": 2}
        answer = await node.ask("PATCH", path, body, {"If-Match": '"1"'})
        assert answer.status == 400
        assert "If-Match asks for version 1" in answer.json["detail"]
        both = await node.ask("PATCH", path, body | {"expected_version": 1}, {"If-Match": '"1"'})
        assert both.status == 200
        anything = await node.ask("PATCH", path, {"content": "c"}, {"If-Match": "*"})
        assert anything.status == 200

    run(scenario)


def test_an_unchanged_memory_is_304(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"/api/v1/memories/{await node.add()}"
        for tag in ('"1"', 'W/"1"', '"7", "1"', "*"):
            same = await node.ask("GET", path, None, {"If-None-Match": tag})
            assert (same.status, same.body, same.headers["ETag"]) == (304, b"", '"1"')
        assert (await node.ask("GET", path, None, {"If-None-Match": '"2"'})).status == 200

    run(scenario)


def test_a_request_id_is_echoed_or_made(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.get("/memories", X_Request_Id="trace-42")
        assert answer.headers["X-Request-Id"] == "trace-42"
        made = {(await node.get("/memories")).headers["X-Request-Id"] for _ in range(5)}
        assert len(made) == 5
        unfit = await node.get("/memories", X_Request_Id="two words")
        assert unfit.headers["X-Request-Id"] != "two words"

    run(scenario)


@given(version=st.integers(1, 10**17))
def test_an_etag_that_was_given_is_understood_when_it_comes_back(version: int) -> None:
    from agentmem_node.api.exchange import expected_version, is_unchanged

    class Request:
        headers = {"If-Match": f'"{version}"', "If-None-Match": f'"{version}"'}  # noqa: RUF012

    request: Any = Request()
    assert expected_version(request, None) == version
    assert is_unchanged(request, version)
    assert not is_unchanged(request, version + 1)
