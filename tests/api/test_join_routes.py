"""The routes by which nodes join: who may make a token, and what one without a key may send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., None]
KEY_OPS, KEY_ANA = "am_" + "o" * 52, "am_" + "a" * 52
KEYS: dict[str, Any] = {
    "keys": {KEY_OPS: "ops", KEY_ANA: "ana"},
    "admins": frozenset({KEY_OPS}),
}
REQUEST = {"token_id": "0" * 16, "payload": "{}", "proof": "0" * 64}


def test_only_keys_with_admin_rights_make_tokens(run: Run) -> None:
    async def scenario(node: Any) -> None:
        assert (await node.post("/cluster/join-tokens", {})).status == 401
        refused = await node.post("/cluster/join-tokens", {}, X_API_Key=KEY_ANA)
        assert (refused.status, refused.json["code"]) == (403, "forbidden")
        assert node.service.seen == []
        made = await node.post("/cluster/join-tokens", {"uses": 3}, X_API_Key=KEY_OPS)
        assert (made.status, made.json["uses"]) == (201, 3)
        assert made.headers["Cache-Control"] == "no-store"

    run(scenario, **KEYS)


def test_only_keys_with_admin_rights_see_and_revoke_tokens(run: Run) -> None:
    async def scenario(node: Any) -> None:
        ops = {"X-API-Key": KEY_OPS}
        every = "/api/v1/cluster/join-tokens"
        one = f"{every}/{'ab' * 8}"
        for path, method in ((every, "GET"), (one, "DELETE")):
            assert (await node.ask(method, path)).status == 401
            refused = await node.ask(method, path, headers={"X-API-Key": KEY_ANA})
            assert (refused.status, refused.json["code"]) == (403, "forbidden")
        assert node.service.seen == []
        found = await node.ask("GET", every, headers=ops)
        assert [token["joined"] for token in found.json["tokens"]] == [["n4"]]
        revoked = await node.ask("DELETE", one, headers=ops)
        assert (revoked.status, revoked.json) == (200, found.json["tokens"][0])
        unknown = await node.ask("DELETE", one + "0", headers=ops)
        assert (unknown.status, unknown.json["code"]) == (404, "not_found")

    run(scenario, **KEYS)


def test_a_node_joins_without_a_key(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.post("/cluster/join", REQUEST)
        assert (answer.status, answer.json["payload"]) == (200, "{}")
        assert node.service.seen[0].token_id == "0" * 16

    run(scenario, **KEYS)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"token_id": "x"}, 400),
        ({"proof": "0"}, 400),
        ({"payload": 1}, 400),
        ({"more": 1}, 400),
        ({"payload": "x" * 13_000}, 400),
        ({"payload": "x" * 17_000}, 413),
    ],
)
def test_a_request_to_join_is_small_and_has_its_form(
    run: Run, change: dict[str, Any], status: int
) -> None:
    async def scenario(node: Any) -> None:
        assert (await node.post("/cluster/join", REQUEST | change)).status == status
        assert node.service.seen == []

    run(scenario)


@pytest.mark.parametrize("wish", [{"ttl_s": 0}, {"ttl_s": 700_000}, {"uses": 0}, {"node": "N 4"}])
def test_a_token_that_makes_no_sense_is_not_made(run: Run, wish: dict[str, Any]) -> None:
    async def scenario(node: Any) -> None:
        refused = await node.post("/cluster/join-tokens", wish)
        assert (refused.status, refused.json["code"]) == (400, "invalid_field")
        assert node.service.seen == []

    run(scenario)
