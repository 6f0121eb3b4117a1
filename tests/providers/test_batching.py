"""The batcher with a small engine that computes real, checkable vectors: no model needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_cluster.errors import InternalError, Overloaded, ShuttingDown
from agentmem_node.providers.base import Vectors
from agentmem_node.providers.batching import (
    BATCH_TEXTS_MAX,
    BATCH_TOKENS_MAX,
    Batcher,
    BatchingLimits,
    VectorCache,
)


class LetterEngine:
    """Counts letters: the vector of a text is known without a model. A gate holds its thread."""

    dim = 32

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.broken = False

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        return [min(256, len(text.split()) + 2) for text in texts]

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.entered.set()
        assert self.gate.wait(20)
        if self.broken:
            raise RuntimeError("no")
        self.batches.append(list(texts))
        return np.stack([letters(text) for text in texts])


def letters(text: str) -> Vectors:
    vector = np.zeros(32, np.float32)
    vector[0] = 1
    for character in text.encode():
        vector[character % 32] += 1
    return vector / np.float32(np.linalg.norm(vector))


def run(scene: Any, **limits: int) -> Any:
    async def play() -> Any:
        engine = LetterEngine()
        batcher = Batcher(engine, BatchingLimits(**limits))
        try:
            return await asyncio.wait_for(scene(engine, batcher), 20)
        finally:
            engine.gate.set()
            await batcher.close()

    return asyncio.run(play())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text(max_size=40), max_size=12), max_size=8))
def test_each_request_gets_its_own_vectors_in_its_own_order(requests: list[list[str]]) -> None:
    async def scene(_: LetterEngine, batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.embed(texts, urgent=False) for texts in requests))

    for texts, rows in zip(requests, run(scene), strict=True):
        assert rows.shape == (len(texts), 32)
        for text, row in zip(texts, rows, strict=True):
            assert np.array_equal(row, letters(text.encode("utf-8", "replace").decode()))


def test_no_batch_exceeds_its_bounds_and_long_texts_do_not_pad_short_ones() -> None:
    texts = [f"{i} " + "word " * (250 if i % 10 == 0 else 5) for i in range(200)]

    async def scene(engine: LetterEngine, batcher: Batcher) -> list[list[str]]:
        await batcher.embed(texts, urgent=False)
        return engine.batches

    batches = run(scene)
    assert sum(len(batch) for batch in batches) == 200
    for batch in batches:
        longest = max(len(text.split()) + 2 for text in batch)
        assert len(batch) <= BATCH_TEXTS_MAX
        assert longest * len(batch) <= BATCH_TOKENS_MAX
    mixed = [b for b in batches if len({len(text.split()) > 100 for text in b}) == 2]
    assert len(mixed) <= 1


def test_requests_that_wait_are_joined_into_one_batch() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> list[list[str]]:
        engine.gate.clear()
        first = asyncio.create_task(batcher.embed(["first"], urgent=False))
        await asyncio.to_thread(engine.entered.wait, 10)
        rest = [asyncio.create_task(batcher.embed([f"r{i}"], urgent=False)) for i in range(8)]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, *rest)
        return engine.batches

    assert sorted(len(batch) for batch in run(scene)) == [1, 8]


def test_a_query_overtakes_documents_that_wait() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> int:
        engine.gate.clear()
        documents = asyncio.create_task(
            batcher.embed([f"document {i}" for i in range(200)], urgent=False)
        )
        await asyncio.to_thread(engine.entered.wait, 10)
        query = asyncio.create_task(batcher.embed(["query"], urgent=True))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(documents, query)
        return engine.batches.index(["query"])

    assert run(scene) == 1


def test_a_text_is_computed_once_however_many_ask_for_it() -> None:
    async def scene(
        engine: LetterEngine, batcher: Batcher
    ) -> tuple[list[list[str]], dict[str, int]]:
        engine.gate.clear()
        tasks = [
            asyncio.create_task(batcher.embed(["same", "same"], urgent=i > 2)) for i in range(5)
        ]
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(*tasks)
        await batcher.embed(["same"], urgent=True)
        return engine.batches, batcher.stats()

    batches, stats = run(scene)
    assert batches == [["same"]]
    assert stats["cache_hits"] == 1 and stats["queued_texts"] == 0 and stats["queued_bytes"] == 0


def test_a_full_queue_refuses_instead_of_growing() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> None:
        engine.gate.clear()
        first = asyncio.create_task(batcher.embed(["1", "2", "3"], urgent=False))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.embed(["4", "5"], urgent=False)
        engine.gate.set()
        await first
        await batcher.embed(["4", "5"], urgent=False)

    run(scene, queued_texts_max=4)


def test_bytes_that_wait_are_bounded_too() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> None:
        engine.gate.clear()
        first = asyncio.create_task(batcher.embed(["x" * 100], urgent=False))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.embed(["y" * 100], urgent=False)
        engine.gate.set()
        await first

    run(scene, queued_bytes_max=150)


def test_texts_nobody_waits_for_any_more_are_not_computed() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> list[list[str]]:
        engine.gate.clear()
        first = asyncio.create_task(batcher.embed(["first"], urgent=False))
        await asyncio.to_thread(engine.entered.wait, 10)
        abandoned = asyncio.create_task(batcher.embed(["abandoned"], urgent=False))
        await asyncio.sleep(0)
        abandoned.cancel()
        await asyncio.gather(abandoned, return_exceptions=True)
        engine.gate.set()
        await first
        await batcher.embed(["last"], urgent=False)
        assert batcher.stats()["queued_texts"] == 0
        return engine.batches

    assert run(scene) == [["first"], ["last"]]


def test_a_failing_batch_fails_its_requests_and_no_later_one() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> None:
        engine.broken = True
        with pytest.raises(InternalError):
            await batcher.embed(["a"], urgent=False)
        engine.broken = False
        assert (await batcher.embed(["a"], urgent=False)).shape == (1, 32)

    run(scene)


def test_closing_answers_everyone_who_waits() -> None:
    async def scene(engine: LetterEngine, batcher: Batcher) -> None:
        engine.gate.clear()
        waiting = [asyncio.create_task(batcher.embed(["in hand"], urgent=False))]
        await asyncio.to_thread(engine.entered.wait, 10)
        waiting += [asyncio.create_task(batcher.embed([f"{i}"], urgent=False)) for i in range(5)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        engine.gate.set()
        await closing
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(answers[0], np.ndarray)
        assert all(isinstance(answer, ShuttingDown) for answer in answers[1:])
        with pytest.raises(ShuttingDown):
            await batcher.embed(["late"], urgent=False)

    run(scene)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=200))
def test_the_cache_never_exceeds_its_bytes_and_keeps_the_recent(
    steps: list[tuple[bool, int]],
) -> None:
    cache = VectorCache(5 * (32 * 4 + VectorCache.ENTRY_OVERHEAD_BYTES), 32)
    recent: list[bytes] = []
    for write, number in steps:
        key = bytes([number])
        if write:
            cache.put(key, np.full(32, number, np.float32))
        elif key not in recent[-5:]:
            assert cache.get(key) is None
            continue
        else:
            found = cache.get(key)
            assert found is not None and found[0] == number
        recent = [k for k in recent if k != key] + [key]
        assert len(cache) <= 5
