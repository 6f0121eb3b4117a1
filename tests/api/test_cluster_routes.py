"""The operators' routes: what they take, whom they let in, and that a repetition is harmless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agentmem_node.api.admin_routes import ADMIN_ROUTES
from agentmem_node.model import operations as ops

Run = Callable[..., None]
KEY_OPS, KEY_ANA = "am_" + "o" * 52, "am_" + "a" * 52
KEYS: dict[str, Any] = {
    "keys": {KEY_OPS: "ops", KEY_ANA: "ana"},
    "admins": frozenset({KEY_OPS}),
}
DRAIN = {"kind": "drain", "node": "n3"}
EVERY_ROUTE = [
    (route.method, route.path.replace("{id}", "op1"), DRAIN if route.body else None)
    for route in ADMIN_ROUTES
]


def test_a_plan_tells_what_would_be_done_and_changes_nothing(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.post("/cluster/plan", DRAIN)
        plan = msgspec.json.decode(answer.body, type=ops.OperationPlan, strict=True)
        assert [step.shard for step in plan.steps] == ["s00", "s01", "s02", "s03"]
        assert plan.steps[0].to_members == ["n1", "n2", "n4"]
        assert plan.bytes == sum(step.bytes for step in plan.steps)
        assert (await node.get("/cluster/operations")).json == {"operations": []}

    run(scenario)


def test_an_operation_is_begun_seen_stopped_and_resumed(run: Run) -> None:
    async def scenario(node: Any) -> None:
        begun = await node.post("/cluster/operations", DRAIN)
        assert begun.status == 202
        operation = msgspec.json.decode(begun.body, type=ops.Operation)
        path = f"/cluster/operations/{operation.id}"
        assert (await node.get(path)).json["steps"][0]["state"] == "copying"
        stopped = await node.post(f"{path}/stop", None)
        assert (stopped.status, stopped.json["state"]) == (200, "stopped")
        again = await node.post(f"{path}/stop", None)
        assert (again.status, again.json["code"]) == (409, "conflict")
        assert (await node.post(f"{path}/resume", None)).json["state"] == "running"
        (listed,) = (await node.get("/cluster/operations")).json["operations"]
        assert listed["id"] == operation.id

    run(scenario)


def test_an_operation_that_is_sent_twice_under_one_key_begins_once(run: Run) -> None:
    async def scenario(node: Any) -> None:
        first = await node.post("/cluster/operations", DRAIN, Idempotency_Key="drain-1")
        again = await node.post("/cluster/operations", DRAIN, Idempotency_Key="drain-1")
        assert first.json["id"] == again.json["id"]
        assert len(node.service.stored) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("wish", "field", "said"),
    [
        ({}, "kind", "missing"),
        (
            {"kind": "explode"},
            "kind",
            "Allowed: move, drain, undrain, remove, rebalance, split, rewind, heal",
        ),
        ({"kind": "heal"}, "kind", "heals by itself"),
        ({"kind": "move", "shard": "s01"}, "node", "a move needs `shard` and `node`"),
        ({"kind": "drain"}, "node", "missing"),
        ({"kind": "split"}, "shard", "missing"),
        ({"kind": "rebalance", "node": "n1"}, "node", "no further field"),
        ({"kind": "drain", "node": "n1", "shard": "s01"}, "shard", "does not belong to a drain"),
        ({"kind": "drain", "node": "n1", "at_slot": 5}, "at_slot", "does not belong"),
        ({"kind": "split", "shard": "s01", "at_slot": 0}, "at_slot", ">= 1"),
        ({"kind": "split", "shard": "s01", "at_slot": 16384}, "at_slot", "<= 16383"),
        ({"kind": "split", "shard": "s01", "at_slot": "9"}, "at_slot", "int"),
        ({"kind": "move", "shard": "s01", "node": ""}, "node", ">= 1"),
        ({"kind": "move", "shard": "s01", "node": "n" * 65}, "node", "<= 64"),
        (
            {"kind": "move", "shard": "s01", "node": "n1", "away_from": "n1"},
            "away_from",
            "is none",
        ),
        ({"kind": "move", "shard": "s01", "nod": "n1"}, "nod", "Did you mean `node`?"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_by_field_and_nothing_happens(
    run: Run, wish: dict[str, Any], field: str, said: str
) -> None:
    async def scenario(node: Any) -> None:
        for path in ("/cluster/plan", "/cluster/operations"):
            answer = await node.post(path, wish)
            assert (answer.status, answer.json["code"]) == (400, "invalid_field")
            assert answer.json["details"]["field"] == field
            assert said in answer.json["detail"]
        assert node.service.callers == []

    run(scenario)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"kind": "move", "shard": "s3", "node": "n4"}, "Did you mean 's03'?"),
        ({"kind": "move", "shard": "orders", "node": "n4"}, "There are: s00, s01, s02, s03."),
        ({"kind": "drain", "node": "n33"}, "Did you mean 'n3'?"),
        ({"kind": "move", "shard": "s03", "node": "n4", "away_from": "m1"}, "Did you mean 'n1'?"),
    ],
)
def test_a_name_that_is_none_is_not_found_and_the_nearest_is_named(
    run: Run, wish: dict[str, Any], said: str
) -> None:
    async def scenario(node: Any) -> None:
        for path in ("/cluster/plan", "/cluster/operations"):
            answer = await node.post(path, wish)
            assert (answer.status, answer.json["code"]) == (404, "not_found")
            assert said in answer.json["detail"]
        assert node.service.stored == []

    run(scenario)


def test_an_operation_that_is_none_is_not_found(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.post("/cluster/operations", DRAIN)
        for method, end in (("GET", ""), ("POST", "/stop"), ("POST", "/resume")):
            answer = await node.ask(method, f"/api/v1/cluster/operations/op2{end}")
            assert answer.status == 404
            assert "Did you mean 'op1'?" in answer.json["detail"]
        assert (await node.get("/cluster/operations/op1/history")).status == 404

    run(scenario)


def test_check_tells_each_finding_and_whether_all_hold(run: Run) -> None:
    async def scenario(node: Any) -> None:
        good = ops.Finding(name="one epoch", ok=True, message="4 shards")
        bad = ops.Finding(name="equal digests", ok=False, message="s02 differs on n3")
        for findings in ([good], [good, bad]):
            node.service.findings = findings
            answer = await node.get("/cluster/check")
            assert answer.status == 200
            assert answer.json["ok"] == (findings == [good])
            assert [f["name"] for f in answer.json["findings"]] == [f.name for f in findings]

    run(scenario)


@pytest.mark.parametrize(("method", "path", "body"), EVERY_ROUTE)
def test_only_keys_with_admin_rights_may(run: Run, method: str, path: str, body: Any) -> None:
    async def scenario(node: Any) -> None:
        await node.post("/cluster/operations", DRAIN, X_API_Key=KEY_OPS)
        before = len(node.service.callers)
        refused = await node.ask(method, path, body, {"X-API-Key": KEY_ANA})
        assert (refused.status, refused.json["code"]) == (403, "forbidden")
        assert "agentmem key new --admin" in refused.json["detail"]
        assert (await node.ask(method, path, body)).status == 401
        assert len(node.service.callers) == before
        assert (await node.ask(method, path, body, {"X-API-Key": KEY_OPS})).status != 403

    run(scenario, **KEYS)


@pytest.mark.parametrize(("method", "path", "body"), EVERY_ROUTE)
def test_without_any_key_whoever_may_ask_is_an_operator(
    run: Run, method: str, path: str, body: Any
) -> None:
    async def scenario(node: Any) -> None:
        assert (await node.ask(method, path, body)).status not in (401, 403)

    run(scenario)


def test_a_request_without_a_key_is_no_operator_where_keys_are_optional(run: Run) -> None:
    async def scenario(node: Any) -> None:
        node.service.needs_key = False
        assert (await node.get("/memories")).status == 200
        refused = await node.post("/cluster/operations", DRAIN)
        assert refused.status == 403
        assert "without an API key" in refused.json["detail"]
        assert node.service.stored == []

    run(scenario, **KEYS)


def test_an_operation_says_whose_key_began_it(run: Run) -> None:
    async def scenario(node: Any) -> None:
        begun = await node.post("/cluster/operations", DRAIN, X_API_Key=KEY_OPS)
        assert begun.json["by"] == "ops"

    run(scenario, **KEYS)


def test_operators_get_through_to_a_node_that_refuses_everybody_else(run: Run) -> None:
    async def scenario(node: Any) -> None:
        admission = node.server._api.admission
        admission.enter("search")  # the only place there is
        try:
            assert (await node.get("/memories")).status == 429
            assert (await node.post("/cluster/plan", DRAIN)).status == 200
            for _ in range(32):
                admission.enter("admin")
            refused = await node.post("/cluster/plan", DRAIN)
            assert (refused.status, refused.json["code"]) == (429, "overloaded")
        finally:
            admission.leave("search")
            for _ in range(32):
                admission.leave("admin")
        assert (await node.post("/cluster/plan", DRAIN)).status == 200

    run(scenario, limits__requests_in_flight_max=1)


def test_the_view_of_the_cluster_is_as_documented(run: Run) -> None:
    async def scenario(node: Any) -> None:
        told = (await node.get("/cluster")).json["nodes"]["n1"]
        assert (told["state"], told["zone"]) == ("draining", "rack 7")

    run(scenario)
