"""A filter means the same to the index (masks), to lists (one memory) and to a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.source import IndexDoc
from agentmem_node.model.filters import Filter, matches, parse_filter
from agentmem_node.model.ids import format_id
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Memory, Scope
from agentmem_node.model.search import SearchQuery
from agentmem_node.model.times import format_ms, parse_time_ms

START_MS = 1_700_000_000_000
NAMES = ["ana", "bo", "Ana"]
scalars = st.sampled_from(["Oslo", "oslo", "", "12", 1, 1.0, 0, 2.5, True, False])
values = st.one_of(scalars, st.lists(scalars, max_size=2))
metadata = st.dictionaries(
    st.sampled_from(["city", "n", "a.b"]),
    st.one_of(values, st.dictionaries(st.sampled_from(["b", "n"]), values, max_size=2)),
    max_size=2,
)
memories = st.builds(
    Memory,
    id=st.integers(0, 9).map(lambda n: format_id(n.to_bytes(16, "big"))),
    content=st.sampled_from(["Tea in Oslo", "the river", ""]),
    user_id=st.sampled_from(["ana"]),
    agent_id=st.sampled_from([*NAMES, None]),
    run_id=st.sampled_from([*NAMES, None]),
    memory_type=st.sampled_from(["episodic", "semantic"]),
    importance=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    categories=st.lists(st.sampled_from(["work", "Work trip", "food"]), max_size=2),
    metadata=metadata,
    created_at=st.integers(0, 4).map(lambda d: format_ms(START_MS + d)),
    updated_at=st.integers(0, 4).map(lambda d: format_ms(START_MS + d)),
    expires_at=st.sampled_from([None, format_ms(START_MS + 10_000), format_ms(START_MS + 20_000)]),
)

times = st.integers(0, 4).map(lambda d: format_ms(START_MS + d))
fields = {
    "agent_id": (
        st.sampled_from([*NAMES, "an"]),
        ["eq", "ne", "in", "nin", "contains", "icontains"],
    ),
    "run_id": (st.sampled_from(NAMES), ["eq", "ne", "in", "nin", "exists"]),
    "created_at": (times, ["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]),
    "updated_at": (times, ["gt", "lte"]),
    "expires_at": (
        st.sampled_from([format_ms(START_MS + 10_000), format_ms(START_MS + 15_000)]),
        ["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "exists"],
    ),
    "memory_type": (st.sampled_from(["episodic", "semantic", "core"]), ["eq", "ne", "in", "nin"]),
    "importance": (
        st.sampled_from([0, 0.3, 0.5]),
        ["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"],
    ),
    "categories": (
        st.sampled_from(["work", "WORK", "food"]),
        ["eq", "ne", "in", "nin", "contains", "icontains", "exists"],
    ),
    "content": (
        st.sampled_from(["tea", "Tea", "river", ""]),
        ["eq", "ne", "contains", "icontains"],
    ),
    "id": (
        st.integers(0, 9).map(lambda n: format_id(n.to_bytes(16, "big")).upper()),
        ["eq", "ne", "in"],
    ),
    "metadata.city": (scalars, ["eq", "ne", "gt", "lte", "in", "nin", "contains", "exists"]),
    "metadata.n": (scalars, ["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "exists"]),
    "metadata.a.b": (scalars, ["eq", "ne", "exists"]),
    "metadata.city.n": (scalars, ["eq", "ne", "exists"]),
}


@st.composite
def comparisons(draw: Any) -> dict[str, Any]:
    field = draw(st.sampled_from(sorted(fields)))
    value, operators = fields[field]
    op = draw(st.sampled_from(operators))
    if op == "exists":
        return {field: {op: draw(st.booleans())}}
    if op in ("in", "nin"):
        return {field: {op: draw(st.lists(value, min_size=1, max_size=3))}}
    if op == "icontains":
        return {field: {op: str(draw(value))}}
    if op in ("gt", "gte", "lt", "lte") and field.startswith("metadata"):
        return {field: {op: draw(st.sampled_from([0, 1, 2, "Oslo", "0"]))}}
    return {field: {op: draw(value)}}


trees = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"AND": parts}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"OR": parts}),
        inner.map(lambda part: {"NOT": part}),
    ),
    max_leaves=6,
)


class Source:
    dim = 0

    def __init__(self, found: Sequence[Memory]) -> None:
        self.docs = [
            IndexDoc(
                number,
                bytes.fromhex(memory.id.replace("-", "")),
                "acme",
                memory,
                parse_time_ms(memory.created_at),
                parse_time_ms(memory.updated_at),
                None if memory.expires_at is None else parse_time_ms(memory.expires_at),
                None,
            )
            for number, memory in enumerate(found)
        ]

    def scan(self, tenant: str, owner: str | None) -> Iterator[IndexDoc]:
        return iter(self.docs)

    def count(self, tenant: str, owner: str | None) -> int:
        return len(self.docs)

    def vectors(self, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.zeros((len(docs), 0), np.float32)

    def records(self, docs: Sequence[int]) -> list[bytes]:
        return [str(doc).encode() for doc in docs]

    def memory(self, doc: int) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self.docs[doc].memory)
        return found


def model(tree: dict[str, Any], memory: Memory) -> bool:
    """The JSON form, read naively."""
    ((key, value),) = tree.items()
    if key == "AND":
        return all(model(part, memory) for part in value)
    if key == "OR":
        return any(model(part, memory) for part in value)
    if key == "NOT":
        return not model(value, memory)
    ((op, wanted),) = value.items()
    stored: Any
    if key.startswith("metadata."):
        path = key.removeprefix("metadata.")
        stored = memory.metadata.get(path)
        if path not in memory.metadata:
            stored = memory.metadata
            for name in path.split("."):
                stored = stored.get(name) if isinstance(stored, dict) else None
    else:
        stored = getattr(memory, key)
    if key == "id":
        wanted = [w.lower() for w in wanted] if isinstance(wanted, list) else wanted.lower()

    def is_same(a: Any, b: Any) -> bool:
        return isinstance(a, bool) == isinstance(b, bool) and a == b

    def equals(one: Any) -> bool:
        return is_same(stored, one) or (
            isinstance(stored, list) and any(is_same(s, one) for s in stored)
        )

    if op == "exists":
        return wanted is (stored is not None and stored != [])
    if op in ("eq", "ne"):
        return equals(wanted) is (op == "eq")
    if op in ("in", "nin"):
        return any(map(equals, wanted)) is (op == "in")
    if op in ("contains", "icontains"):
        if isinstance(stored, list) and op == "contains":
            return any(is_same(s, wanted) for s in stored)
        if isinstance(stored, list):
            return any(isinstance(s, str) and wanted.lower() in s.lower() for s in stored)
        if not isinstance(stored, str) or not isinstance(wanted, str):
            return False
        return wanted.lower() in stored.lower() if op == "icontains" else wanted in stored
    number = (int, float)
    if isinstance(stored, bool) or not (
        (isinstance(stored, number) and isinstance(wanted, number))
        or (isinstance(stored, str) and isinstance(wanted, str))
    ):
        return False
    return {
        "gt": stored > wanted,  # type: ignore[operator]
        "gte": stored >= wanted,  # type: ignore[operator]
        "lt": stored < wanted,  # type: ignore[operator]
        "lte": stored <= wanted,  # type: ignore[operator]
    }[op]


def by_masks(found: Sequence[Memory], tree: Filter) -> list[bool]:
    source = Source(found)
    query = SearchQuery(
        "acme", Scope(), len(found) + 1, START_MS, legs=(("recency", 1.0),), filter=tree
    )
    hits = ShardIndex(source).search_local(query).hits
    passed = {int(hit.record) for hit in hits}
    return [number in passed for number in range(len(found))]


@settings(max_examples=400, deadline=None)
@given(st.lists(memories, min_size=1, max_size=8), trees)
def test_masks_lists_and_the_model_agree(found: list[Memory], raw: dict[str, Any]) -> None:
    tree = parse_filter(raw, Limits())
    assert tree is not None
    expected = [model(raw, memory) for memory in found]
    assert [matches(tree, memory) for memory in found] == expected
    assert by_masks(found, tree) == expected


def test_what_is_missing_is_not_equal() -> None:
    nobody = Memory(id="", content="", created_at="2026-01-01", updated_at="2026-01-01")
    for raw in ({"agent_id": {"ne": "x"}}, {"metadata.city": {"nin": ["Oslo"]}}):
        tree = parse_filter(raw, Limits())
        assert tree is not None and matches(tree, nobody)


def test_a_memory_that_never_expires_expires_at_no_given_time() -> None:
    lasting = Memory(
        id=format_id(bytes(16)),
        content="",
        user_id="ana",
        created_at=format_ms(START_MS),
        updated_at=format_ms(START_MS),
    )
    passing = msgspec.structs.replace(lasting, expires_at=format_ms(START_MS + 10_000))
    when = format_ms(START_MS + 10_000)
    for test, expected in [
        ({"ne": when}, [True, False]),
        ({"nin": [when]}, [True, False]),
        ({"eq": when}, [False, True]),
        ({"gt": format_ms(START_MS)}, [False, True]),
        ({"exists": False}, [True, False]),
    ]:
        tree = parse_filter({"expires_at": test}, Limits())
        assert tree is not None
        assert by_masks([lasting, passing], tree) == expected
        assert by_masks([lasting], tree) == expected[:1]
