"""A real node answers with the documented types, field by field; hostile input stays 4xx."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from agentmem_node.api import shapes
from agentmem_node.model import requests as rq

pytestmark = pytest.mark.process
VECTOR = [0.5, 0.5, 0.5, 0.5]


def strictly(type_: Any, body: bytes) -> Any:
    value = msgspec.json.decode(body, type=type_)
    assert msgspec.json.decode(msgspec.json.encode(value)) == msgspec.json.decode(body)
    return value


class RealNode:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, bytes, Any]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """One node without an embedding model: words and the clients' own vectors of four numbers."""
    folder = tmp_path_factory.mktemp("node")
    command = [sys.executable, "-m", "agentmem_node.cli.main", "serve", "--data", str(folder)]
    for setting in (
        "node.listen=127.0.0.1:0",
        "embedding.provider=none",
        "embedding.dim=4",
        "cluster.shards=4",
    ):
        command += ["--set", setting]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"ready at (http://\S+)", line):
                yield RealNode(found[1])
                break
        else:
            pytest.fail((folder / "log").read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_every_answer_is_of_its_documented_type(node: RealNode) -> None:
    memories = "/api/v1/memories"
    body = {"content": "Ana drinks tea.", "user_id": "ana", "metadata": {"a": [1, None]}}
    status, content, headers = node.ask("POST", memories, body | {"vector": VECTOR})
    assert status == 201
    added = strictly(shapes.AddResults, content)
    assert headers["X-AgentMem-Token"] == added.token
    path = f"{memories}/{added.results[0].id}"

    status, content, headers = node.ask("GET", path)
    assert strictly(shapes.OneMemory, content).memory == added.results[0].memory
    assert headers["ETag"] == '"1"'
    status, content, _ = node.ask("PATCH", path, {"content": "Ana drinks rooibos."})
    assert strictly(shapes.OneMemory, content).version == 2
    status, content, _ = node.ask("PATCH", path, {"content": "lost"}, If_Match='"1"')
    assert (status, json.loads(content)["code"]) == (409, "conflict")

    status, content, _ = node.ask("GET", f"{memories}?user_id=ana&limit=1")
    assert len(strictly(shapes.MemoryPage, content).results) == 1
    search = {"query": "rooibos", "vector": VECTOR, "user_id": "ana", "explain": True}
    status, content, _ = node.ask("POST", f"{memories}/search", search)
    found = strictly(shapes.SearchResults, content)
    assert found.results[0].id == added.results[0].id
    assert {"vector", "bm25"} <= set(found.results[0].legs)
    searches = {"searches": [search, {"query": "rooibos"}, {"query": "nothing at all"}]}
    status, content, _ = node.ask("POST", f"{memories}/search/batch", searches)
    answers = strictly(shapes.SearchBatchResults, content).results
    assert [len(answer.results) for answer in answers[:2]] == [1, 1]

    batch = {"memories": [body, {"content": ""}, {"contnt": "x"}]}
    status, content, _ = node.ask("POST", f"{memories}/batch", batch)
    assert [item.event for item in strictly(shapes.AddResults, content).results] == [
        "ADD",
        "ERROR",
        "ERROR",
    ]
    status, content, _ = node.ask("DELETE", path, None, If_Match='"2"')
    assert strictly(rq.DeleteAnswer, content).results[0].event == "DELETE"
    status, content, _ = node.ask("GET", f"{path}/history")
    events = [entry.event for entry in strictly(rq.HistoryAnswer, content).results]
    assert events == ["ADD", "UPDATE", "DELETE"]
    status, content, _ = node.ask("POST", f"{memories}/batch/delete", {"ids": ["x"]})
    assert strictly(rq.DeleteAnswer, content).results[0].event == "ERROR"
    status, content, _ = node.ask("GET", "/api/v1/cluster")
    assert msgspec.json.decode(content, type=shapes.ClusterView).tenant == "default"


def test_a_write_under_one_key_takes_effect_once(node: RealNode) -> None:
    body = {"content": "said once", "user_id": "once", "vector": VECTOR}
    first = node.ask("POST", "/api/v1/memories", body, Idempotency_Key="k-1")
    again = node.ask("POST", "/api/v1/memories", body, Idempotency_Key="k-1")
    ids = [json.loads(content)["results"][0]["id"] for _, content, _ in (first, again)]
    assert ids[0] == ids[1]
    status, content, _ = node.ask(
        "POST", "/api/v1/memories", body | {"content": "another"}, Idempotency_Key="k-1"
    )
    assert (status, json.loads(content)["code"]) == (409, "conflict")
    _, content, _ = node.ask("GET", "/api/v1/memories?user_id=once")
    assert len(json.loads(content)["results"]) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"query": "a", "vector": [1.0]},
        {"query": "a", "vector": [0.0, 0.0, 0.0, 0.0]},
        {"query": "a", "filters": {"unknown": 1}},
        {"query": "a", "filters": {"AND": {}}},
        {"query": "a", "filters": {"created_at": {"gt": "soon"}}},
        {"query": "a", "filters": {"user_id": {"like": "a"}}},
        {"query": "a", "cursor": "made up"},
        {"query": "a", "token": "made up"},
        {"query": "a", "legs": {"bm25": -1}},
        {"query": "a", "consistency": "session"},
        {"query": " "},
        {},
    ],
)
def test_a_search_that_means_nothing_is_400(node: RealNode, body: dict[str, Any]) -> None:
    status, content, _ = node.ask("POST", "/api/v1/memories/search", body)
    error = strictly(shapes.ErrorBody, content)
    assert status == 400, error
    assert len(error.detail) > 20


def test_the_metrics_of_a_node_are_those_that_are_documented(node: RealNode) -> None:
    _, content, _ = node.ask("GET", "/metrics")
    text = content.decode()
    for name in (
        "agentmem_add_memory_total",
        "agentmem_search_duration_seconds_count",
        "agentmem_raft_commit_index",
        "agentmem_shard_memories",
        "agentmem_journal_fsyncs_total",
        "agentmem_node_info",
    ):
        assert re.search(rf"^{name}{{? ?", text, re.MULTILINE), name
