"""What adding text costs beyond the embedding model itself.

    python -m benchmarks.embed [--scale 0.1] [--json FILE]

The bare side is the model in this process, fed with all texts sorted by length, which wastes
least on padding; the other side is one node that gets the same number of texts through HTTP, in
batches of 100 with four under way, journals and indexes them. Both use one thread for the model.
They take turns, and each figure is a median: the machine's mood hits both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator

from agentmem_client import AsyncClient
from agentmem_node.providers.minilm import MiniLmEngine
from agentmem_node.providers.model_files import ensure_model
from benchmarks import servers
from benchmarks.load import median
from benchmarks.report import Row, benchmark_main

TITLE = "Adds of text, beside the bare embedding model"
SHARE_TARGET = 0.9

_TEXTS = 1_500  # a round; 10 s of one core
_ROUNDS = 3
_WARM_UP = 64
_BATCH = 100
_IN_FLIGHT = 4
_MODEL_BATCH = 32

_OPENINGS = ["Ana says", "Ben noted that", "Today", "Last week", "The team agreed", "Note:"]
# fmt: off
_WORDS = [
    "tea", "garden", "river", "meeting", "project", "deadline", "coffee", "dinner", "music", "book",
    "morning", "train", "friend", "sister", "office", "kitchen", "plan", "budget", "release", "was",
    "customer", "ticket", "answer", "walk", "winter", "holiday", "likes", "moved", "bought", "near",
    "finished", "started", "wants", "cancelled", "booked", "prefers", "found", "before", "after",
]
# fmt: on


def texts(count: int, seed: int) -> list[str]:
    """Distinct texts of 15 to 40 words: a cache answers none of them."""
    rng = random.Random(seed)
    return [
        f"{rng.choice(_OPENINGS)} {' '.join(rng.choices(_WORDS, k=rng.randint(12, 37)))} {number}."
        for number in range(count)
    ]


def bare_rate(engine: MiniLmEngine, batch: list[str]) -> float:
    """Texts a second of the model alone, tokenising included."""
    started = time.perf_counter()
    counts = engine.token_counts(batch)
    ordered = [text for _, text in sorted(zip(counts, batch, strict=True), key=lambda p: -p[0])]
    for start in range(0, len(ordered), _MODEL_BATCH):
        engine.embed(ordered[start : start + _MODEL_BATCH])
    return len(batch) / (time.perf_counter() - started)


async def added_rate(url: str, batch: list[str], owner: str) -> float:
    """Texts a second that a node acknowledges."""
    parts = [batch[i : i + _BATCH] for i in range(0, len(batch), _BATCH)]
    gate = asyncio.Semaphore(_IN_FLIGHT)
    async with AsyncClient(url) as client:

        async def add(part: list[str]) -> None:
            async with gate:
                memories = [{"content": text} for text in part]
                answer = await client.add_many(memories, user_id=owner, deadline_s=300.0)
                if answer.errors:
                    raise RuntimeError(f"an add failed: {answer.errors[0][1]}")

        started = time.perf_counter()
        await asyncio.gather(*(add(part) for part in parts))
        return len(batch) / (time.perf_counter() - started)


@contextlib.contextmanager
def _node() -> Iterator[str]:
    os.environ["AGENTMEM_EMBEDDING_THREADS"] = "1"  # as the bare side has, on any machine
    try:
        with servers.agentmem_node(provider="minilm") as server:
            yield server.url()
    finally:
        del os.environ["AGENTMEM_EMBEDDING_THREADS"]


def measure(scale: float, progress: Callable[[str], None]) -> list[Row]:
    count = max(_BATCH * _IN_FLIGHT, int(_TEXTS * scale))
    progress("loading the model")
    engine = MiniLmEngine(ensure_model(), threads=1)
    bare: list[float] = []
    added: list[float] = []
    with _node() as url:
        bare_rate(engine, texts(_WARM_UP, 1))
        asyncio.run(added_rate(url, texts(_WARM_UP, 2), "warm-up"))
        for number in range(_ROUNDS):
            progress(f"round {number + 1} of {_ROUNDS}: bare model")
            bare.append(bare_rate(engine, texts(count, 10 + number)))
            progress(f"round {number + 1} of {_ROUNDS}: adds through HTTP")
            added.append(asyncio.run(added_rate(url, texts(count, 20 + number), f"owner-{number}")))
    share = median([a / b for a, b in zip(added, bare, strict=True)])
    detail = {"texts_a_round": count, "bare": bare, "added": added}
    return [
        Row("bare model, sorted by length", median(bare), "texts/s"),
        Row("adds through HTTP, one node", median(added), "texts/s"),
        Row("adds / bare model", share, "", target=SHARE_TARGET, detail=detail),
    ]


if __name__ == "__main__":
    benchmark_main(TITLE, measure)
