"""Reading a record back: the same answer on every replica, whatever the bytes."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.model.memory import Memory
from agentmem_node.model.records import Stored, decode_memory

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
memories = st.builds(
    Memory,
    id=texts,
    content=texts,
    user_id=st.one_of(st.none(), texts),
    importance=st.floats(0, 1),
    categories=st.lists(texts, max_size=3),
    metadata=st.dictionaries(texts, plain, max_size=3),
    created_at=texts,
    updated_at=texts,
    version=st.integers(1, 1 << 31),
)


@given(memories)
def test_a_record_decodes_to_the_memory_it_was_made_of(memory: Memory) -> None:
    assert decode_memory(msgspec.json.encode(memory)) == memory


@given(st.binary(max_size=100))
def test_any_bytes_are_a_memory_or_none(data: bytes) -> None:
    decode_memory(data)


def nested(depth: int) -> bytes:
    deep = b"[" * depth + b"]" * depth
    return b'{"id":"1","content":"","created_at":"","updated_at":"","metadata":{"a":%s}}' % deep


def test_deep_records_are_refused_alike_on_any_stack() -> None:
    """The parser's own bound moves with Python's stack, and replicas must not disagree."""

    def at(frames: int, record: bytes) -> bool:
        return decode_memory(record) is not None if not frames else at(frames - 1, record)

    for frames in (0, 100, 500):
        assert at(frames, nested(120))
        assert not at(frames, nested(200))
        assert not at(frames, nested(100_000))


def test_brackets_within_a_text_are_not_nesting() -> None:
    text = '[{"\\' * 500
    memory = Memory(id="1", content=text, created_at="", updated_at="")
    assert decode_memory(msgspec.json.encode(memory)) == memory


def test_a_memory_is_expired_from_its_moment_on() -> None:
    stored = Stored(bytes(16), b"{}", 1, 0, 0, 1000)
    assert [stored.is_expired(now) for now in (999, 1000, 1001)] == [False, True, True]
    assert not stored._replace(expires_ms=None).is_expired(1 << 60)
