"""Each route does what it says, over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agentmem_node.api import shapes
from agentmem_node.model import requests as rq

Run = Callable[..., None]


def strictly(type_: Any, body: bytes) -> Any:
    """Decode, refusing fields that the documented type does not have."""
    value = msgspec.json.decode(body, type=type_)
    assert msgspec.json.decode(msgspec.json.encode(value)) == msgspec.json.decode(body)
    return value


def test_an_added_memory_is_answered_with_201_its_token_and_the_memory(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.post("/memories", {"content": "Ana drinks tea.", "user_id": "ana"})
        assert answer.status == 201
        added = strictly(shapes.AddResults, answer.body)
        assert added.results[0].memory.content == "Ana drinks tea."
        assert added.token == answer.headers["X-AgentMem-Token"] == "s01:1"
        assert answer.headers["Content-Type"] == "application/json"

    run(scenario)


def test_a_memory_is_got_changed_and_deleted(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"/memories/{await node.add()}"
        got = await node.get(path)
        assert got.status == 200
        assert strictly(shapes.OneMemory, got.body).memory.version == 1
        assert got.headers["ETag"] == '"1"'
        changed = await node.ask("PATCH", f"/api/v1{path}", {"content": "Ana drinks coffee."})
        assert strictly(shapes.OneMemory, changed.body).memory.content == "Ana drinks coffee."
        assert changed.headers["ETag"] == '"2"'
        history = await node.get(f"{path}/history")
        assert strictly(rq.HistoryAnswer, history.body).results[0].event == "ADD"
        deleted = await node.ask("DELETE", f"/api/v1{path}")
        assert strictly(rq.DeleteAnswer, deleted.body).results[0].event == "DELETE"
        gone = await node.get(path)
        assert (gone.status, gone.json["code"]) == (404, "not_found")

    run(scenario)


def test_a_batch_answers_each_item_in_its_place(run: Run) -> None:
    async def scenario(node: Any) -> None:
        items = [
            {"content": "a", "user_id": "u"},
            {"user_id": "u"},
            {"content": "c", "app_id": "x"},
        ]
        answer = await node.post("/memories/batch", {"memories": items})
        assert answer.status == 200
        added = strictly(shapes.AddResults, answer.body)
        assert [item.event for item in added.results] == ["ADD", "ERROR", "ADD"]
        assert added.results[1].error.code == "invalid_field"
        ids = [added.results[0].id, "00000000-0000-8000-8000-00000000ffff"]
        deleted = await node.post("/memories/batch/delete", {"ids": ids})
        results = strictly(rq.DeleteAnswer, deleted.body).results
        assert [item.event for item in results] == ["DELETE", "ERROR"]

    run(scenario)


def test_a_malformed_item_of_a_batch_is_refused_alone(run: Run) -> None:
    async def scenario(node: Any) -> None:
        good = {"content": "a", "user_id": "u"}
        items = [good, {"contnt": "b"}, 5, good, {"content": "x", "importance": 7}, None]
        answer = await node.post("/memories/batch", {"memories": items})
        assert answer.status == 200
        results = strictly(shapes.AddResults, answer.body).results
        assert [item.event for item in results] == [
            "ADD",
            "ERROR",
            "ERROR",
            "ADD",
            "ERROR",
            "ERROR",
        ]
        assert "There is no field `contnt`" in results[1].error.detail
        assert results[2].error.detail.startswith("The item is wrong: expected `object`")
        only = await node.post("/memories/batch", {"memories": [{"contnt": "b"}]})
        assert (only.status, only.json["code"]) == (400, "invalid_field")

    run(scenario)


def test_a_search_splices_the_score_into_the_stored_memory(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.add("Ana drinks tea.", metadata={"score": "not this one", "quote": '"}'})
        await node.add("Ben drinks coffee.")
        answer = await node.post("/memories/search", {"query": "drinks tea", "user_id": "ana"})
        found = strictly(shapes.SearchResults, answer.body)
        assert [(hit.content, hit.score) for hit in found.results] == [
            ("Ana drinks tea.", 1.0),
            ("Ben drinks coffee.", 0.5),
        ]
        assert found.token == answer.headers["X-AgentMem-Token"] == "s01:7"
        assert found.next_cursor is None
        assert found.results[0].legs is msgspec.UNSET

    run(scenario)


def test_an_explained_search_tells_each_leg(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.add("tea")
        answer = await node.post("/memories/search", {"query": "tea", "top_k": 1, "explain": True})
        found = strictly(shapes.SearchResults, answer.body)
        assert found.results[0].legs["bm25"].rank == 1
        assert found.next_cursor == "cursor"

    run(scenario)


def test_a_batch_of_searches_answers_in_order(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.add("tea")
        searches = [{"query": word} for word in ["tea", "nothing", "tea"] * 10]
        answer = await node.post("/memories/search/batch", {"searches": searches})
        found = strictly(shapes.SearchBatchResults, answer.body)
        assert [len(one.results) for one in found.results] == [1, 0, 1] * 10

    run(scenario)


def test_a_failing_search_of_a_batch_is_named(run: Run) -> None:
    async def scenario(node: Any) -> None:
        body = {"searches": [{"query": "tea"}, {"query": "tea", "top_k": 5000}]}
        answer = await node.post("/memories/search/batch", body)
        assert answer.status == 400
        assert answer.json["detail"].startswith("searches[1]: `top_k` is 5000")

    run(scenario)


def test_a_list_is_paged(run: Run) -> None:
    async def scenario(node: Any) -> None:
        for number in range(3):
            await node.add(f"memory {number}")
        answer = await node.get('/memories?limit=2&user_id=ana&filters={"memory_type":"core"}')
        page = strictly(shapes.MemoryPage, answer.body)
        assert len(page.results) == 2
        assert page.next_cursor == "more"
        query = node.service.seen[-1]
        assert (query.limit, query.user_id, query.filters) == (2, "ana", {"memory_type": "core"})

    run(scenario)


def test_a_token_in_the_header_serves_a_session_read(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"/memories/{await node.add()}?consistency=session"
        await node.get(path, X_AgentMem_Token="s01:5")
        assert node.service.seen[-1] == ("session", "s01:5")
        await node.get(f"{path}&token=s01:6", X_AgentMem_Token="s01:5")
        assert node.service.seen[-1] == ("session", "s01:6")
        await node.post(
            "/memories/search", {"query": "x", "consistency": "session"}, X_AgentMem_Token="s01:5"
        )
        assert node.service.seen[-1].token == "s01:5"
        await node.get("/memories", X_AgentMem_Token="s01:5")
        assert node.service.seen[-1].token == "s01:5"
        await node.get("/memories")
        assert node.service.seen[-1].token is None

    run(scenario)


def test_the_cluster_view_names_the_callers_tenant(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.get("/cluster")
        view = msgspec.json.decode(answer.body, type=shapes.ClusterView)
        assert view.tenant == "default"
        assert view.shards["s01"].leader == "n1"

    run(scenario)


def test_health_follows_the_service(run: Run) -> None:
    async def scenario(node: Any) -> None:
        live = await node.ask("GET", "/health/live")
        assert (live.status, strictly(shapes.Liveness, live.body).status) == (200, "ok")
        ready = await node.ask("GET", "/health/ready")
        assert (ready.status, strictly(shapes.Readiness, ready.body).status) == (200, "ready")
        node.service.is_ready = False
        waiting = await node.ask("GET", "/health/ready")
        assert (waiting.status, waiting.json["reasons"]) == (503, {"s01": "no leader"})
        assert "Retry-After" in waiting.headers

    run(scenario)


def test_a_trailing_slash_makes_no_difference(run: Run) -> None:
    async def scenario(node: Any) -> None:
        memory_id = await node.add()
        assert (await node.get(f"/memories/{memory_id}/")).status == 200
        assert (await node.get("/memories/")).status == 200
        assert (await node.post("/memories/search/", {"query": "tea"})).status == 200
        assert (await node.get("/memories//")).status == 404

    run(scenario)
