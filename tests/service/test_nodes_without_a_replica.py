"""Five real nodes, three copies of each shard: every node serves every memory, with a replica of
it or without, and goes on when a leader dies."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from agentmem_node.cli.devcluster import DevCluster

pytestmark = pytest.mark.process
USERS = [f"u{number}" for number in range(12)]


def ask(url: str, method: str, path: str, document: object = None, **headers: str) -> Any:
    call = urllib.request.Request(
        url + "/api/v1" + path,
        data=None if document is None else json.dumps(document).encode(),
        headers={"Content-Type": "application/json"}
        | {name.replace("_", "-"): value for name, value in headers.items()},
        method=method,
    )
    try:
        with urllib.request.urlopen(call, timeout=20) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError((error.code, error.read())) from None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    settings = {"embedding.provider": "none", "cluster.shards": 4}
    folder = tmp_path_factory.mktemp("five")
    with DevCluster(folder, nodes=5, settings=settings) as five:
        yield five


def places(url: str) -> dict[str, Any]:
    shards: dict[str, Any] = ask(url, "GET", "/cluster")["shards"]
    return shards


def leader_of(cluster: DevCluster, shard: str) -> str:
    """As its members say, which know it best."""
    members = places(cluster.urls[0])[shard]["members"]
    until = time.monotonic() + 15
    while time.monotonic() < until:
        for number, url in enumerate(cluster.urls, start=1):
            if f"n{number}" in members and cluster.is_running(number):
                leader: str | None = places(url)[shard]["leader"]
                if leader is not None:
                    return leader
        time.sleep(0.1)
    raise AssertionError(f"{shard} has no leader")


def test_every_node_writes_reads_and_finds_the_memories_of_every_shard(cluster: DevCluster) -> None:
    urls = cluster.urls
    ids = {}
    for number, user in enumerate(USERS):
        body = {"content": f"{user} drinks tea", "user_id": user, "agent_id": "barista"}
        ids[user] = ask(urls[number % 5], "POST", "/memories", body)["results"][0]["id"]
    for number, user in enumerate(USERS):
        there = urls[(number + 2) % 5]
        answer = ask(there, "PATCH", f"/memories/{ids[user]}", {"importance": 0.25})
        assert answer["memory"]["version"] == 2
    for url in urls:
        for user in USERS:
            memory = ask(url, "GET", f"/memories/{ids[user]}")["memory"]
            assert (memory["user_id"], memory["importance"]) == (user, 0.25)
            assert len(ask(url, "GET", f"/memories/{ids[user]}/history")["results"]) == 2
            own = ask(url, "POST", "/memories/search", {"query": "tea", "user_id": user})
            assert [hit["id"] for hit in own["results"]] == [ids[user]]
        listed = ask(url, "GET", "/memories?agent_id=barista&limit=50")
        assert {memory["id"] for memory in listed["results"]} == set(ids.values())
        # A number that JSON can say and msgpack, which nodes speak, cannot.
        filters = {"NOT": [{"metadata.size": {"gt": 10**30}}]}
        asked = urllib.parse.quote(json.dumps(filters))
        listed = ask(url, "GET", f"/memories?agent_id=barista&limit=50&filters={asked}")
        assert {memory["id"] for memory in listed["results"]} == set(ids.values())
        assert listed["partial"] == []
        for fusion in ("weighted", "rrf"):
            query = {"query": "tea", "agent_id": "barista", "top_k": 50, "fusion": fusion}
            found = ask(url, "POST", "/memories/search", query | {"filters": filters})
            assert {hit["id"] for hit in found["results"]} == set(ids.values())
            assert found["partial"] == []


def test_a_node_without_a_replica_finds_the_successor_of_a_leader_that_died(
    cluster: DevCluster,
) -> None:
    shards = places(cluster.urls[0])
    leaders = {shard: leader_of(cluster, shard) for shard in shards}
    shard, info = next((s, i) for s, i in shards.items() if leaders[s] != "n1")
    outside = next(
        url for n, url in enumerate(cluster.urls, start=1) if f"n{n}" not in info["members"]
    )
    # Users by the shard their memories lie on.
    user = ""
    for number in range(200):
        user = f"v{number}"
        body = {"content": "tea", "user_id": user}
        token = ask(outside, "POST", "/memories", body)["token"]
        if token.startswith(shard):
            break
    leader = leader_of(cluster, shard)
    cluster.kill(leader)
    try:
        for number in range(3):
            body = {"content": f"after {number}", "user_id": user}
            answer = ask(outside, "POST", "/memories", body, Idempotency_Key=f"k{number}")
            assert answer["token"].startswith(shard)
        listed = ask(outside, "GET", f"/memories?user_id={user}")
        assert len(listed["results"]) == 4
    finally:
        cluster.restart(leader)
