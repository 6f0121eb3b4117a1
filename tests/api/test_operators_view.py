"""Metrics and the access log as they come out of a running node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., None]
KEY = "am_" + "a" * 52


def test_metrics_count_by_route_and_never_by_path(run: Run) -> None:
    async def scenario(node: Any) -> None:
        memory_id = await node.add()
        await node.get(f"/memories/{memory_id}")
        await node.get("/memories/unknown-id-1")
        await node.get("/nowhere-2")
        await node.post("/memories/search", {"query": "tea"})
        answer = await node.ask("GET", "/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.body.decode()
        assert memory_id not in text
        assert "nowhere-2" not in text
        requests = "agentmem_http_requests_total"
        for line in (
            f'{requests}{{method="GET",route="/api/v1/memories/{{id}}",status="404"}} 1.0',
            f'{requests}{{method="GET",route="(none)",status="404"}} 1.0',
            'agentmem_add_memory_total{tenant="default"} 1.0',
            'agentmem_search_duration_seconds_count{tenant="default"} 1.0',
            'agentmem_raft_term{group="s01"} 3.0',
            'agentmem_shard_memories{shard="s01"} 1.0',
        ):
            assert line in text

    run(scenario)


def test_the_access_log_tells_who_and_what_but_no_secrets(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentmem.access")

    async def scenario(node: Any) -> None:
        await node.get("/memories?user_id=private", X_API_Key=KEY, X_Request_Id="r1")
        await node.get("/memories", X_API_Key="am_wrong", X_Request_Id="r2")

    run(scenario, keys={KEY: "ana"}, node__access_log=True)
    first, second = (record.fields for record in caplog.records if record.name == "agentmem.access")
    assert (first["tenant"], first["status"], first["request_id"]) == ("ana", 200, "r1")
    assert first["route"] == "/api/v1/memories"
    assert (second["status"], second["request_id"]) == (401, "r2")
    text = " ".join(str(vars(record)) for record in caplog.records)
    assert "private" not in text
    assert KEY not in text


def test_the_access_log_is_off_unless_asked_for(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "agentmem")

    async def scenario(node: Any) -> None:
        await node.get("/memories")

    run(scenario)
    assert caplog.records == []
