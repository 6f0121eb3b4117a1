"""The order of results depends neither on the number of shards nor on the replica that answers.

Real nodes, real HTTP: one node with one shard, one with sixteen, and a cluster of three.
"""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem_node.cli.devcluster import DevCluster

pytestmark = pytest.mark.process

DIM = 8
WORDS = ["tea", "oslo", "coffee", "train", "garden", "piano", "rain", "book", "river", "lamp"]
SETTINGS = {"embedding.provider": "none", "embedding.dim": DIM}


def ask(url: str, path: str, document: object) -> Any:
    call = urllib.request.Request(
        url + "/api/v1" + path,
        data=json.dumps(document).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=20) as answer:
        return json.loads(answer.read())


def memories() -> list[dict[str, Any]]:
    chance = random.Random(5)
    items = []
    for number in range(240):
        item: dict[str, Any] = {
            "content": f"m{number} " + " ".join(chance.choices(WORDS, k=6)),
            "user_id": f"u{number % 17}",
            "run_id": f"r{number % 5}",
            "importance": number / 240,
            "metadata": {"number": number, "city": chance.choice(["Oslo", "Rome"])},
            "created_at": f"2026-03-{1 + number % 27:02d}T12:{number // 10:02d}:{number % 60:02d}Z",
            "vector": [abs(chance.gauss(0, 1)) for _ in range(DIM)],
        }
        if number % 3 == 0:
            item["agent_id"] = "planner"
        items.append(item)
    return items


def searches() -> list[dict[str, Any]]:
    chance = random.Random(6)
    vector = [abs(chance.gauss(0, 1)) for _ in range(DIM)]
    return [
        {"query": "tea in oslo", "top_k": 25},
        # Ranks within equal scores go by id, and ids differ between clusters: legs without ties.
        {"vector": vector, "legs": {"vector": 1, "importance": 1}, "fusion": "rrf", "top_k": 25},
        {"query": "garden piano", "vector": vector, "top_k": 40},
        {"vector": vector, "top_k": 40, "agent_id": "planner"},
        {"query": "lamp rain", "agent_id": "planner", "top_k": 30},
        {"query": "book", "vector": vector, "filters": {"metadata.city": "Oslo"}, "top_k": 30},
        {"query": "river lamp", "run_id": "r2", "top_k": 30, "threshold": 0.05},
        {
            "query": '"tea oslo" cofee',
            "legs": {"bm25": 1, "phrase": 1, "fuzzy": 0.5, "importance": 0.1},
            "top_k": 30,
        },
        {"query": "tea", "user_id": "u3", "top_k": 20},
    ]


def found(url: str, search: dict[str, Any]) -> list[tuple[int, float]]:
    answer = ask(url, "/memories/search", search)
    assert answer["partial"] == []
    return [(hit["metadata"]["number"], hit["score"]) for hit in answer["results"]]


def paged(url: str, search: dict[str, Any], size: int) -> list[tuple[int, float]]:
    rows: list[tuple[int, float]] = []
    cursor = None
    for _ in range(100):
        page = dict(search, top_k=size)
        if cursor is not None:
            page["cursor"] = cursor
        answer = ask(url, "/memories/search", page)
        assert answer["partial"] == []
        rows += [(hit["metadata"]["number"], hit["score"]) for hit in answer["results"]]
        cursor = answer["next_cursor"]
        if cursor is None:
            return rows
    raise AssertionError("the pages never ended")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URLs of: one shard, sixteen shards, and the three nodes of a cluster; all hold the same."""
    base: Path = tmp_path_factory.mktemp("places")
    clusters = {
        "one": DevCluster(base / "one", nodes=1, settings={**SETTINGS, "cluster.shards": 1}),
        "many": DevCluster(base / "many", nodes=1, settings={**SETTINGS, "cluster.shards": 16}),
        "three": DevCluster(base / "three", nodes=3, settings=SETTINGS),
    }
    started: list[DevCluster] = []
    try:
        for cluster in clusters.values():
            started.append(cluster)
            cluster.start()
            cluster.wait_ready()
        urls = {
            "one shard": clusters["one"].urls[0],
            "sixteen shards": clusters["many"].urls[0],
            **{f"replica {n + 1}": url for n, url in enumerate(clusters["three"].urls)},
        }
        for name in ("one shard", "sixteen shards", "replica 1"):
            answer = ask(urls[name], "/memories/batch", {"memories": memories()})
            assert all(item["event"] == "ADD" for item in answer["results"])
        yield urls
    finally:
        for cluster in started:
            cluster.stop()


@pytest.mark.parametrize("number", range(len(searches())))
def test_every_place_gives_the_same_order_and_scores(places: dict[str, str], number: int) -> None:
    search = searches()[number]
    # Ids differ between clusters and break ties, so equal scores are compared as sets.
    expected = by_score(found(places["one shard"], search), search["top_k"])
    assert expected
    for name, url in places.items():
        assert by_score(found(url, search), search["top_k"]) == expected, name


@pytest.mark.parametrize("number", [0, 1, 2, 4, 7])
def test_pages_joined_are_the_whole(places: dict[str, str], number: int) -> None:
    search = searches()[number]
    for name, url in places.items():
        whole = found(url, dict(search, top_k=1_000))
        assert paged(url, search, 7) == whole, name


def test_replicas_of_a_cluster_agree_on_ties_too(places: dict[str, str]) -> None:
    rank_fusion = {"query": "tea in oslo", "fusion": "rrf", "top_k": 50}
    for search in [*searches(), rank_fusion]:
        first = found(places["replica 1"], search)
        assert found(places["replica 2"], search) == first
        assert found(places["replica 3"], search) == first


def by_score(rows: list[tuple[int, float]], top_k: int) -> list[tuple[float, set[int]]]:
    """(score, who has it) in order; the last group of a full page may be cut, so it is left out."""
    groups: list[tuple[float, set[int]]] = []
    for number, score in rows:
        if not groups or groups[-1][0] != score:
            groups.append((score, set()))
        groups[-1][1].add(number)
    return groups[:-1] if len(rows) == top_k and len(groups) > 1 else groups
