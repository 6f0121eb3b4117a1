"""Vectors: exact integer scans, an order like that of float32, and graphs for large blocks."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_node.index import graph
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.vectors import QueryVector, VectorRows, exact_cosines, scale_of
from agentmem_node.model.filters import Compare
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import SearchQuery

_spec = importlib.util.spec_from_file_location(
    "index_vectors", Path(__file__).with_name("conftest.py")
)
assert _spec is not None and _spec.loader is not None
kit = importlib.util.module_from_spec(_spec)
sys.modules["index_vectors"] = kit
_spec.loader.exec_module(kit)

Matrix = npt.NDArray[np.float32]


def unit_rows(rng: np.random.Generator, count: int, dim: int) -> Matrix:
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1, 3, 8, 384, 1536]))
def test_a_scan_is_exact_integer_arithmetic_however_rows_lie(
    seed: int, count: int, dim: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_rows(rng, count, dim)
    rows = VectorRows(dim)
    rows.reserve(count + 1, 1)
    rows.put(np.arange(1, count + 1), vectors)
    query = QueryVector(unit_rows(rng, 1, dim)[0].tobytes(), rows.scale)
    scanned = rows.scan(query, count + 1)
    products = rows.codes[: count + 1].astype(int) @ query.codes[0].astype(int)
    assert scanned.tolist() == (products * query.unit).tolist()
    order = rng.permutation(count) + 1
    assert rows.gather(query, order).tolist() == scanned[order].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_an_exact_cosine_does_not_depend_on_its_neighbours_in_memory(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_rows(rng, count, 384)
    query = QueryVector(unit_rows(rng, 1, 384)[0].tobytes(), scale_of(384))
    together = exact_cosines(vectors, query)
    alone = [exact_cosines(vectors[i : i + 1], query)[0] for i in range(count)]
    assert together.tolist() == alone
    floats = query.exact * (1 << 20)
    assert together == pytest.approx(vectors @ floats, abs=1e-5)


def test_the_int8_error_is_within_the_margin_that_is_scored_again() -> None:
    rng = np.random.default_rng(1)
    for dim in (32, 384):
        vectors = unit_rows(rng, 5_000, dim)
        rows = VectorRows(dim)
        rows.reserve(5_001, 1)
        rows.put(np.arange(1, 5_001), vectors)
        for near in range(20):
            vector = vectors[near] + unit_rows(rng, 1, dim)[0] * np.float32(0.4)
            vector /= np.linalg.norm(vector)
            query = QueryVector(vector.astype("<f4").tobytes(), rows.scale)
            error = rows.scan(query, 5_001)[1:] - vectors @ vector
            assert error.std() == pytest.approx(query.deviation, rel=0.25)
            assert (np.abs(error) < 3.5 * query.deviation).mean() > 0.998


def fill(source: Any, vectors: Matrix, **fields: Any) -> None:
    for number, vector in enumerate(vectors):
        source.add(number + 1, f"note {number % 50}", vector, user_id="ana", **fields)


def search(index: ShardIndex, vector: Matrix, **changes: Any) -> list[tuple[bytes, float]]:
    query = SearchQuery("acme", Scope(user_id="ana"), 10, kit.NOW_MS, vector=vector.tobytes())
    found = index.search_local(dataclasses.replace(query, **changes))
    return [(hit.id, hit.score) for hit in found.hits]


def test_vector_search_finds_the_nearest_of_float32(source: Any) -> None:
    rng = np.random.default_rng(2)
    source.dim = 384
    vectors = unit_rows(rng, 2_000, 384)
    fill(source, vectors)
    index = ShardIndex(source)
    found = 0
    for number in range(50):
        near = vectors[number] + unit_rows(rng, 1, 384)[0]
        near /= np.linalg.norm(near)
        nearest = np.argsort(-(vectors @ near), kind="stable")[:10]
        hits = search(index, near)
        found += len({int.from_bytes(key, "big") - 1 for key, _ in hits} & set(nearest.tolist()))
        assert hits[0][1] == pytest.approx(float(vectors[nearest[0]] @ near), abs=1e-5)
    assert found >= 499


SMALL_GRAPH = RankingDefaults(graph_rows_min=300, graph_depth=64)


def graph_of(index: ShardIndex) -> Any:
    (block,) = index._blocks._ready.values()
    return block.graph


def wait_for_graph(index: ShardIndex, vector: Matrix) -> None:
    deadline = time.monotonic() + 20
    while True:
        search(index, vector)
        held = graph_of(index)
        if held is not None and held._graph is not None and not held.is_building:
            return
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_graph_answers_like_the_scan(source: Any) -> None:
    rng = np.random.default_rng(4)
    source.dim = 32
    vectors = unit_rows(rng, 1_200, 32)
    fill(source, vectors)
    exact, index = ShardIndex(source), ShardIndex(source, defaults=SMALL_GRAPH)
    wait_for_graph(index, vectors[0])
    same = 0
    for number in range(100):
        near = vectors[number] + unit_rows(rng, 1, 32)[0] * np.float32(0.7)
        near /= np.linalg.norm(near)
        for changes in ({}, {"text": f"note {number % 7}"}):
            expected = search(exact, near, **changes)
            found = search(index, near, **changes)
            same += found == expected
            assert dict(found).items() <= dict(search(exact, near, top_k=2_000, **changes)).items()
    assert same >= 190
    index.close()


def test_a_graph_knows_at_once_what_was_added_changed_and_deleted(source: Any) -> None:
    rng = np.random.default_rng(5)
    source.dim = 32
    vectors = unit_rows(rng, 800, 32)
    fill(source, vectors)
    index = ShardIndex(source, defaults=SMALL_GRAPH)
    wait_for_graph(index, vectors[0])
    for number in range(60):
        gone, moved = 2 * number + 1, 2 * number + 2
        index.apply([source.delete(gone)])
        assert gone.to_bytes(16, "big") not in dict(search(index, vectors[gone - 1]))
        fresh = unit_rows(rng, 1, 32)[0]
        index.apply([source.update(moved, fresh)])
        assert search(index, fresh)[0][0] == moved.to_bytes(16, "big")
        newest = unit_rows(rng, 1, 32)[0]
        index.apply([source.add(10_000 + number, "new", newest, user_id="ana")])
        assert search(index, newest)[0][0] == (10_000 + number).to_bytes(16, "big")
    index.close()


def test_a_graph_is_rebuilt_when_a_fifth_is_outdated_and_searches_go_on(source: Any) -> None:
    rng = np.random.default_rng(6)
    source.dim = 32
    vectors = unit_rows(rng, 500, 32)
    fill(source, vectors)
    exact, index = ShardIndex(source), ShardIndex(source, defaults=SMALL_GRAPH)
    wait_for_graph(index, vectors[0])
    first = graph_of(index)._graph
    for number in range(150):
        change = source.add(5_000 + number, "new", unit_rows(rng, 1, 32)[0], user_id="ana")
        for each in (exact, index):
            each.apply([change])
        search(index, vectors[number])
    wait_for_graph(index, vectors[0])
    assert graph_of(index)._graph is not first
    for doc in rng.permutation(500)[:400].tolist():  # packed on the way
        change = source.delete(doc + 1)
        for each in (exact, index):
            each.apply([change])
    agree = sum(search(index, v) == search(exact, v) for v in unit_rows(rng, 30, 32))
    assert agree >= 28
    index.close()


def test_a_strict_filter_is_answered_by_the_scan(source: Any) -> None:
    rng = np.random.default_rng(7)
    source.dim = 32
    vectors = unit_rows(rng, 600, 32)
    fill(source, vectors)
    exact, index = ShardIndex(source), ShardIndex(source, defaults=SMALL_GRAPH)
    wait_for_graph(index, vectors[0])
    few = Compare("content", "eq", "note 7")
    for vector in unit_rows(rng, 20, 32):
        assert search(index, vector, filter=few) == search(exact, vector, filter=few)
        assert len(search(index, vector, filter=few)) == 10
    index.close()


def test_memories_without_a_vector_are_no_vector_hits(source: Any) -> None:
    source.add(1, "tea", None, user_id="ana")
    source.add(2, "tea", kit.unit([1.0] * kit.DIM), user_id="ana")
    index = ShardIndex(source)
    vector = kit.unit([1.0] * kit.DIM)
    assert [key[-1] for key, _ in search(index, vector)] == [2]
    assert [key[-1] for key, _ in search(index, vector, text="tea")] == [2, 1]


def test_a_lexical_index_has_no_vectors(source: Any) -> None:
    source.dim = 0
    source.add(1, "tea", None, user_id="ana")
    query = SearchQuery("acme", Scope(user_id="ana"), 5, kit.NOW_MS, text="tea")
    assert len(ShardIndex(source).search_local(query).hits) == 1


def test_memories_nearer_to_each_other_than_int8_can_tell_come_in_the_order_of_float32(
    source: Any,
) -> None:
    rng = np.random.default_rng(8)
    source.dim = 384
    centre = unit_rows(rng, 1, 384)[0]
    vectors = centre + unit_rows(rng, 400, 384) * np.float32(0.02)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fill(source, vectors.astype(np.float32))
    index = ShardIndex(source)
    agree = 0
    for probe in unit_rows(rng, 20, 384):
        vector = centre + probe * np.float32(0.5)
        vector /= np.linalg.norm(vector)
        cosines = vectors.astype(np.float64) @ vector
        best = np.argsort(-cosines, kind="stable")[:10] + 1
        found = [int.from_bytes(key, "big") for key, _ in search(index, vector)]
        agree += found == best.tolist()
    assert agree >= 18


def test_what_changes_while_a_graph_is_built_is_not_taken_from_it(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(9)
    source.dim = 32
    vectors = unit_rows(rng, 400, 32)
    fill(source, vectors)
    index = ShardIndex(source, defaults=SMALL_GRAPH)
    read, go_on = threading.Event(), threading.Event()
    build = graph._build

    def slow(*arguments: Any) -> Any:
        built = build(*arguments)
        read.set()
        assert go_on.wait(20)
        return built

    monkeypatch.setattr(graph, "_build", slow)
    search(index, vectors[0])
    assert read.wait(20)
    moved = unit_rows(rng, 1, 32)[0]
    index.apply([source.update(5, moved), source.delete(6)])
    go_on.set()
    wait_for_graph(index, vectors[0])
    assert search(index, moved)[0][0] == (5).to_bytes(16, "big")
    assert (6).to_bytes(16, "big") not in dict(search(index, vectors[5]))
    assert search(index, vectors[4])[0][1] < 0.99
    index.close()
