"""An order of results depends on the memories and the query alone: not on how the index came to
hold them, on the replica, on the number of shards or on the size of a page."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_node.index import blocks, selection
from agentmem_node.index.blocks import BlockBudget
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.fusion import Fused, LegResults, fuse
from agentmem_node.index.scoring import TextStats, merge_stats
from agentmem_node.index.shard_index import ShardIndex, active_legs, owner_of_query
from agentmem_node.index.source import Change
from agentmem_node.model.filters import And, Compare, Not, Or, matches
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import SearchQuery

_spec = importlib.util.spec_from_file_location(
    "index_histories", Path(__file__).with_name("conftest.py")
)
assert _spec is not None and _spec.loader is not None
kit = importlib.util.module_from_spec(_spec)
sys.modules["index_histories"] = kit
_spec.loader.exec_module(kit)

DAY_MS = 86_400_000
USERS = ["ana", "bo", None]
RUNS = ["monday", "friday", None]

adds = st.fixed_dictionaries(
    {
        "kind": st.just("add"),
        "content": kit.texts,
        "vector": kit.maybe_vectors,
        "user_id": st.sampled_from(USERS),
        "agent_id": st.sampled_from(["planner", None]),
        "run_id": st.sampled_from(RUNS),
        "days": st.integers(0, 3),
        "expires": st.sampled_from([None, None, None, -1, 0, 1]),
        "importance": st.sampled_from([0.1, 0.5, 0.9]),
        "categories": st.sampled_from([[], ["work"], ["work", "food"]]),
        "metadata": st.sampled_from([{}, {"city": "Oslo"}, {"city": "Rome", "n": 3}]),
    }
)
others = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["update", "update", "delete", "delete"]),
        "which": st.integers(0, 1_000),
        "content": kit.texts,
        "vector": kit.maybe_vectors,
        "metadata": st.sampled_from([{}, {"city": "Rome"}]),
    }
)
histories = st.lists(st.one_of(adds, adds, others), min_size=4, max_size=50)

legs = st.sampled_from(
    [
        (),
        (),
        (("bm25", 1.0),),
        (("vector", 1.0),),
        (("vector", 0.3), ("bm25", 1.0), ("recency", 0.2), ("importance", 0.1)),
        (("phrase", 1.0), ("fuzzy", 0.7), ("bm25", 0.1)),
    ]
)
filters = st.sampled_from(
    [
        None,
        None,
        Compare("metadata.city", "eq", "Oslo"),
        Not(Compare("categories", "contains", "food")),
        Compare("importance", "gte", 0.5),
        Compare("content", "icontains", "TEA"),
    ]
)
queries = st.builds(
    lambda **k: SearchQuery(tenant="acme", now_ms=kit.NOW_MS, **k),
    scope=st.builds(
        Scope,
        user_id=st.sampled_from(USERS),
        agent_id=st.sampled_from(["planner", None]),
        run_id=st.sampled_from(["monday", None, None]),
    ),
    top_k=st.integers(1, 7),
    text=st.one_of(kit.texts, st.just("tae gardn on 16 June 2025"), st.none()),
    vector=st.one_of(kit.vectors.map(lambda v: v.tobytes()), st.none()),
    filter=filters,
    legs=legs,
    fusion=st.sampled_from(["weighted", "weighted", "rrf"]),
    threshold=st.sampled_from([None, None, 0.2]),
    explain=st.booleans(),
)


class World:
    """The same history on `shards` shards, each with an index kept current change by change."""

    def __init__(self, shards: int, **index_settings: Any) -> None:
        self.sources = [kit.MemorySource() for _ in range(shards)]
        self.indexes = [ShardIndex(s, **index_settings) for s in self.sources]
        self.live: list[tuple[int, int]] = []  # shard, doc; in the order of their adds
        self.added = 0

    def step(self, op: dict[str, Any]) -> None:
        if op["kind"] == "add":
            owner = Scope(user_id=op["user_id"], agent_id=op["agent_id"], run_id=op["run_id"]).owner
            shard = sum(owner.encode()) % len(self.sources)
            self.added += 1
            change = self.sources[shard].add(
                self.added,
                op["content"],
                op["vector"],
                created_ms=kit.NOW_MS - op["days"] * DAY_MS,
                expires_ms=None if op["expires"] is None else kit.NOW_MS + op["expires"],
                **{
                    k: op[k]
                    for k in (
                        "user_id",
                        "agent_id",
                        "run_id",
                        "importance",
                        "categories",
                        "metadata",
                    )
                },
            )
            self.live.append((shard, change.doc))
        elif not self.live:
            return
        else:
            at = op["which"] % len(self.live)
            shard, doc = self.live[at]
            if op["kind"] == "delete":
                self.live.pop(at)
                change = self.sources[shard].delete(doc)
            else:
                change = self.sources[shard].update(
                    doc, op["vector"], content=op["content"], metadata=op["metadata"]
                )
        self.indexes[shard].apply([change])

    def search(self, query: SearchQuery) -> Fused:
        return over_shards(self.indexes, query)


def over_shards(indexes: list[ShardIndex], query: SearchQuery) -> Fused:
    """Both phases and the fusion, everything that travels sent through msgpack."""
    stats = merge_stats(
        [TextStats.from_wire(over_wire(ix.text_stats(query).to_wire())) for ix in indexes]
    )
    parts = [LegResults.from_wire(over_wire(ix.legs(query, stats).to_wire())) for ix in indexes]
    defaults = indexes[0].defaults
    fused = fuse(query, active_legs(query, defaults), parts, defaults)
    for position, part, doc in fused.missing:
        fused.hits[position].record = indexes[part].records([doc])[0]
    fused.missing = []
    return fused


def over_wire(value: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(value))


@settings(max_examples=100, deadline=None)
@given(histories, st.lists(queries, min_size=1, max_size=4), st.integers(0, 2**32))
def test_an_index_kept_current_answers_like_one_built_afresh(
    history: list[dict[str, Any]], asked: list[SearchQuery], seed: int
) -> None:
    chance = random.Random(seed)
    # Hardly any memory for blocks: they are forgotten and built again all the time.
    budget = chance.choice([1, 1 << 30])
    world = World(1, budget=BlockBudget(budget))
    for op in history:
        if chance.random() < 0.3:
            world.search(chance.choice(asked))
        world.step(op)
    for query in asked:
        fresh = ShardIndex(world.sources[0])
        assert world.search(query) == fresh.search_local(query)
        assert world.indexes[0].search_local(query) == fresh.search_local(query)


@settings(max_examples=100, deadline=None)
@given(histories, st.lists(queries, min_size=1, max_size=4))
def test_one_shard_and_sixteen_give_the_same_order(
    history: list[dict[str, Any]], asked: list[SearchQuery]
) -> None:
    one, many = World(1), World(16)
    for op in history:
        one.step(op)
        many.step(op)
    for query in asked:
        assert one.search(query) == many.search(query)
        assert one.search(query) == one.indexes[0].search_local(query)


@settings(max_examples=100, deadline=None)
@given(histories, queries, st.integers(1, 4))
def test_pages_of_any_size_give_the_same_list(
    history: list[dict[str, Any]], query: SearchQuery, size: int
) -> None:
    world = World(1)
    for op in history:
        world.step(op)
    index = world.indexes[0]
    whole = index.search_local(dataclasses.replace(query, top_k=1_000))
    assert whole.next_after is None
    found = []
    page = dataclasses.replace(query, top_k=size)
    for _ in range(len(history) + 1):
        answer = index.search_local(page)
        found += answer.hits
        if answer.next_after is None:
            break
        page = dataclasses.replace(page, after=answer.next_after)
    assert found == whole.hits


@settings(max_examples=100, deadline=None)
@given(histories, queries)
def test_hits_are_live_unexpired_and_of_the_scope(
    history: list[dict[str, Any]], query: SearchQuery
) -> None:
    world = World(1)
    for op in history:
        world.step(op)
    by_id = {doc.id: doc for doc in world.sources[0].docs.values()}
    scores = []
    for hit in world.search(dataclasses.replace(query, top_k=1_000)).hits:
        doc = by_id[hit.id]
        assert doc.expires_ms is None or doc.expires_ms > query.now_ms
        for name in ("user_id", "agent_id", "run_id"):
            assert getattr(query.scope, name) in (None, getattr(doc.memory, name))
        assert hit.record == world.sources[0].records([doc.doc])[0]
        assert 0.0 <= hit.score <= 1.0
        assert query.threshold is None or hit.score >= query.threshold
        scores.append((-hit.score, hit.id))
        if query.explain and query.fusion == "weighted":
            assert sum(leg.contribution for leg in hit.legs.values()) == pytest.approx(
                hit.score, abs=1e-8
            )
    assert scores == sorted(scores)


@settings(max_examples=60, deadline=None)
@given(histories, histories, queries)
def test_a_block_built_in_steps_misses_no_change_made_meanwhile(
    before: list[dict[str, Any]], during: list[dict[str, Any]], query: SearchQuery
) -> None:
    world = World(1)
    for op in before:
        world.step(op)
    index = world.indexes[0]
    steps = index.build_steps(query)
    for op in during:
        next(steps, None)
        world.step(op)
    assert index.search_local(query) == ShardIndex(world.sources[0]).search_local(query)


def test_a_search_for_an_agent_finds_memories_that_a_user_owns(source: Any) -> None:
    source.add(1, "tea", None, user_id="ana", agent_id="planner")
    assert owner_of_query(Scope(agent_id="planner")) is None
    assert owner_of_query(Scope(user_id="ana", agent_id="planner")) == "user:ana"
    query = SearchQuery("acme", Scope(agent_id="planner"), 5, kit.NOW_MS, text="tea")
    assert len(ShardIndex(source).search_local(query).hits) == 1


def test_another_tenant_is_not_seen(source: Any) -> None:
    source.add(1, "tea", None, user_id="ana", tenant="other")
    for scope in (Scope(user_id="ana"), Scope()):
        query = SearchQuery("acme", scope, 5, kit.NOW_MS, text="tea")
        assert ShardIndex(source).search_local(query).hits == []


def test_a_block_with_many_dead_rows_is_packed_and_answers_the_same(source: Any) -> None:
    rng = np.random.default_rng(3)
    index = ShardIndex(source)
    query = SearchQuery(
        "acme",
        Scope(user_id="ana"),
        20,
        kit.NOW_MS,
        text="tea river",
        vector=kit.unit(rng.standard_normal(kit.DIM)).tobytes(),
        filter=Compare("metadata.n", "gte", 0),
        explain=True,
    )
    index.search_local(query)
    changes: list[Change] = []
    for number in range(400):
        text = " ".join(rng.choice(kit.WORDS, 5))
        vector = kit.unit(rng.standard_normal(kit.DIM))
        fields = {"run_id": f"r{number % 3}", "metadata": {"n": number % 4}}
        changes.append(source.add(number, text, vector, user_id="ana", **fields))
    index.apply(changes)
    index.search_local(query)
    for doc in rng.permutation(400)[:300].tolist():
        index.apply([source.delete(doc + 1)])
    block = next(iter(index._blocks._ready.values()))
    assert block.columns.n < 250
    assert index.search_local(query) == ShardIndex(source).search_local(query)
    index.apply([source.add(999, "tea", kit.unit([1.0] * kit.DIM), user_id="ana", run_id="r1")])
    assert index.search_local(query) == ShardIndex(source).search_local(query)


def test_the_rank_window_bounds_the_ranks(source: Any) -> None:
    for number in range(30):
        source.add(number, "tea " * (number % 5), None, user_id="ana")
    query = SearchQuery("acme", Scope(user_id="ana"), 30, kit.NOW_MS, text="tea", explain=True)
    index = ShardIndex(source, defaults=RankingDefaults(rank_window=10))
    ranks = [hit.legs["bm25"].rank for hit in index.search_local(query).hits]
    assert ranks == [*range(1, 11), *[0] * (len(ranks) - 10)]


def test_an_update_leaves_nothing_of_the_words_before(source: Any) -> None:
    first = source.add(1, "tea tea garden", None, user_id="ana")
    source.add(2, "garden river", None, user_id="ana")
    index = ShardIndex(source)
    query = SearchQuery("acme", Scope(user_id="ana"), 5, kit.NOW_MS, text="tea garden")
    assert [hit.id[-1] for hit in index.search_local(query).hits] == [1, 2]
    index.apply([source.update(first.doc, None, content="river")])
    assert [hit.id[-1] for hit in index.search_local(query).hits] == [2]
    assert index.search_local(query) == ShardIndex(source).search_local(query)


def test_shards_of_a_node_share_one_memory_budget() -> None:
    budget = BlockBudget(60_000)
    sources = [kit.MemorySource() for _ in range(2)]
    indexes = [ShardIndex(source, budget=budget) for source in sources]
    for number in range(20):
        indexes[number % 2].apply([])
        sources[number % 2].add(number, "tea river", None, user_id=f"user{number}")
        query = SearchQuery("acme", Scope(user_id=f"user{number}"), 5, kit.NOW_MS, text="tea")
        assert len(indexes[number % 2].search_local(query).hits) == 1
        assert budget.bytes_used <= 60_000
    held = [index.stats()["blocks"] for index in indexes]
    assert all(held) and sum(held) < 20
    for index in indexes:
        index.close()
    assert budget.bytes_used == 0


def test_a_construction_that_nobody_drives_is_given_up(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_NOTED_MAX", 5)
    for number in range(200):
        source.add(number, "tea", None, user_id="ana")
    index = ShardIndex(source)
    query = SearchQuery("acme", Scope(user_id="ana"), 500, kit.NOW_MS, text="tea")
    next(index.build_steps(query))
    for number in range(200, 210):
        index.apply([source.add(number, "tea", None, user_id="ana")])
    assert len(index.search_local(query).hits) == 210


def test_a_record_deleted_between_two_phases_is_left_out(source: Any) -> None:
    kept = source.add(1, "tea", None, user_id="ana")
    gone = source.add(2, "tea", None, user_id="ana")
    index = ShardIndex(source)
    index.apply([source.delete(gone.doc)])
    assert index.records([kept.doc, gone.doc]) == [source.records([kept.doc])[0], b""]


@pytest.mark.parametrize(
    "asked", [{"text": "tea"}, {"vector": kit.unit([1.0] * kit.DIM).tobytes()}]
)
def test_pages_go_through_thousands_of_equal_memories(
    source: Any, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(selection, "_RESCORED_MAX", 20)
    order = random.Random(1).sample(range(300), 300)
    for number in order:
        source.add(number, "tea", kit.unit([1.0] * kit.DIM), user_id="ana")
    index = ShardIndex(source)
    query = SearchQuery("acme", Scope(user_id="ana"), 7, kit.NOW_MS, explain=True, **asked)
    found: list[int] = []
    while True:
        answer = index.search_local(query)
        found += [int.from_bytes(hit.id, "big") for hit in answer.hits]
        if answer.next_after is None:
            break
        query = dataclasses.replace(query, after=answer.next_after)
    assert found == sorted(order)


def test_columns_for_filters_are_filled_in_steps_and_kept_current(source: Any) -> None:
    def add(number: int) -> Change:
        return source.add(
            number,
            f"tea {number % 7}",
            None,
            user_id="ana",
            metadata={"n": number % 5, "deep": {"n": [number % 3]}},
        )

    for number in range(600):
        add(number)
    index = ShardIndex(source)
    parts = (
        Compare("metadata.n", "in", (1, 2)),
        Compare("metadata.deep.n", "contains", 1),
        Compare("content", "contains", "3"),
    )
    for tree in (*parts, And(parts), Or(parts), Not(parts[2])):
        query = SearchQuery(
            "acme", Scope(user_id="ana"), 700, kit.NOW_MS, legs=(("recency", 1.0),), filter=tree
        )
        steps = index.build_steps(query)
        for number in range(12):
            next(steps, None)
            row = random.Random(number).choice(sorted(source.docs))
            index.apply([add(10_000 + source.next_doc)])
            index.apply([source.update(row, None, content="cup 3", metadata={"n": 9})])
            index.apply([source.delete(row + 1)] if row + 1 in source.docs else [])
        for _ in steps:
            pass
        assert not index.needs_build(query)
        found = index.search_local(query)
        assert found == ShardIndex(source).search_local(query)
        expected = [d.id for d in source.docs.values() if matches(tree, d.memory)]
        assert {hit.id for hit in found.hits} == set(expected)


def test_equal_scores_are_ordered_by_id_across_shards() -> None:
    world = World(4)
    for number in random.Random(2).sample(range(1, 60), 59):
        shard = number * 7 % 4
        world.sources[shard].add(number, "tea", None, user_id=f"user{number}")
    query = SearchQuery("acme", Scope(), 20, kit.NOW_MS, text="tea")
    found: list[int] = []
    for _ in range(3):
        answer = world.search(query)
        found += [int.from_bytes(hit.id, "big") for hit in answer.hits]
        query = dataclasses.replace(query, after=answer.next_after)
    assert found == list(range(1, 60))
    assert answer.next_after is None


def test_a_block_that_fails_to_take_a_change_is_built_afresh(
    source: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source.add(1, "tea", None, user_id="ana")
    index = ShardIndex(source)
    query = SearchQuery("acme", Scope(user_id="ana"), 5, kit.NOW_MS, text="tea")
    assert len(index.search_local(query).hits) == 1
    with monkeypatch.context() as broken:
        broken.setattr("agentmem_node.index.block.Block.put", lambda *_: 1 / 0)
        index.apply([source.add(2, "tea", None, user_id="ana")])
    assert "built afresh" in caplog.text
    assert len(index.search_local(query).hits) == 2
