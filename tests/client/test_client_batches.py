"""Batches: cut, split by leader, and put back in the order that was given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentmem_client as client
from agentmem_client import batches, calls
from agentmem_client.batches import Item
from agentmem_client.results import AddResult
from agentmem_client.topology import Topology
from agentmem_cluster.ring import SLOTS

THREE_LEADERS = Topology.read(
    {
        "version": 1,
        "tenant": "default",
        "nodes": {f"n{i}": {"http": f"http://n{i}"} for i in range(3)},
        "shards": {
            f"s{i:02d}": {
                "epoch": 1,
                "members": ["n0", "n1", "n2"],
                "leader": f"n{i % 3}",
                "slots": [[i * SLOTS // 6, (i + 1) * SLOTS // 6]],
            }
            for i in range(6)
        },
    }
)


def answer_in_turn(call: calls.Call[AddResult]) -> AddResult:
    """What a server answers: a result an item, in the order of the request."""
    assert call.body is not None
    items = json.loads(call.body)["memories"]
    results = [{"event": "ADD", "id": item["content"]} for item in items]
    return call.read({"results": results, "token": f"s00:{len(items)}"})


@given(st.lists(st.sampled_from(["ana", "ben", "cleo", "dev", "eli"]), max_size=40))
def test_results_come_back_in_the_order_of_the_items_however_the_batch_was_split(
    owners: list[str],
) -> None:
    items = [{"content": str(at), "user_id": owner} for at, owner in enumerate(owners)]
    found: list[str | None] = []
    for batch in batches.add_many(items, {}, batch_size=15):
        parts = [(at, answer_in_turn(call)) for at, call in batch.split(THREE_LEADERS)]
        found += [result.id for result in batch.merge(parts)]
    assert found == [item["content"] for item in items]


@given(
    st.lists(st.integers(1, 200), max_size=60),
    st.integers(1, 10),
)
def test_chunks_keep_every_item_in_order_and_both_limits(sizes: list[int], items_max: int) -> None:
    items = [Item(b"x" * size, calls.Anywhere()) for size in sizes]
    cut = list(batches.chunks(items, items_max))
    assert [item for part in cut for item in part] == items
    assert all(1 <= len(part) <= items_max for part in cut)


def test_a_chunk_ends_before_its_body_grows_too_large() -> None:
    items = [Item(b"x" * (3 << 20), calls.Anywhere()) for _ in range(5)]
    assert [len(part) for part in batches.chunks(items)] == [2, 2, 1]


def test_each_leader_gets_one_request_with_a_key_of_its_own() -> None:
    items = [{"content": str(i), "user_id": f"user-{i}"} for i in range(60)]
    (batch,) = batches.add_many(items, {})
    parts = batch.split(THREE_LEADERS)
    assert len(parts) == 3
    assert len({call.idempotency_key for _, call in parts}) == 3
    assert sorted(at for positions, _ in parts for at in positions) == list(range(60))


def test_under_a_callers_key_every_repeat_sends_the_same_requests() -> None:
    items = [{"content": str(i), "user_id": f"user-{i}"} for i in range(25)]

    def requests(topology: Topology | None) -> list[tuple[str | None, bytes | None]]:
        return [
            (call.idempotency_key, call.body)
            for batch in batches.add_many(items, {"idempotency_key": "k"}, batch_size=10)
            for _, call in batch.split(topology)
        ]

    assert requests(None) == requests(THREE_LEADERS)
    assert [key for key, _ in requests(None)] == ["k-0", "k-1", "k-2"]


def test_options_fill_what_an_item_leaves_out_and_never_overrule_it() -> None:
    (batch,) = batches.add_many(
        [{"content": "a"}, {"content": "b", "user_id": "ben"}], {"user_id": "ana"}
    )
    sent = [json.loads(item.body) for item in batch.items]
    assert [item["user_id"] for item in sent] == ["ana", "ben"]


def test_a_misspelt_argument_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'user'.*user_id"):
        list(batches.add_many([], {"user": "ana"}))  # type: ignore[typeddict-unknown-key]


def test_a_server_that_answers_too_few_results_is_not_believed() -> None:
    items = [{"content": str(i), "user_id": f"user-{i}"} for i in range(20)]
    (batch,) = batches.add_many(items, {})
    parts = [(at, AddResult(results=(), token="")) for at, _ in batch.split(THREE_LEADERS)]
    with pytest.raises(client.ProtocolError):
        batch.merge(parts)


@given(st.lists(st.dictionaries(st.sampled_from(["s00", "s01", "s02"]), st.integers(0, 99))))
def test_a_merged_token_is_at_least_as_late_as_each(tokens: list[dict[str, int]]) -> None:
    texts = [",".join(f"{shard}:{at}" for shard, at in token.items()) for token in tokens]
    merged = dict(part.split(":") for part in batches.merge_tokens(texts).split(",") if part)
    latest: dict[str, int] = {}
    for token in tokens:
        for shard, at in token.items():
            latest[shard] = max(at, latest.get(shard, 0))
    assert {shard: int(at) for shard, at in merged.items()} == latest


def test_numbers_that_json_cannot_say_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ValueError):
        calls.search(None, {"vector": [float("nan")], "user_id": "ana"})


def test_an_update_sends_only_what_was_given_and_may_clear_the_expiry() -> None:
    def body(**options: Any) -> Any:
        call = calls.update("x", None, options)  # type: ignore[arg-type]
        assert call.body is not None
        return json.loads(call.body)

    assert body(importance=0.9) == {"importance": 0.9}
    assert body(expires_at=None) == {"expires_at": None}
    assert body(importance=0.2, expected_version=3) == {"importance": 0.2, "expected_version": 3}


def test_an_id_with_slashes_stays_one_part_of_the_path() -> None:
    assert calls.get("../../cluster", {}).path == "/api/v1/memories/..%2F..%2Fcluster"
