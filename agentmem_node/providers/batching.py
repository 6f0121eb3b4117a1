"""One worker thread that turns waiting texts into batches of similar length.

Padding is what a batch costs: one text of 256 tokens makes 31 short ones pay for 256 as well.
So the texts that wait, of however many requests, are sorted by token length and cut into
batches of at most 32 texts and 4,096 padded tokens. Queries go before documents, between any
two batches. The same text asked for twice is computed once, whether it waits or is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from agentmem_cluster.errors import AgentMemError, InternalError, Overloaded, ShuttingDown
from agentmem_node.providers.base import Vectors

BATCH_TEXTS_MAX = 32
BATCH_TOKENS_MAX = 4_096  # padded: bounds the memory of one run to about 60 MB
WINDOW_TEXTS_MAX = 512  # how many are tokenised and sorted together
CLOSE_WAIT_S = 30.0


class Engine(Protocol):
    """The model itself. Called from the worker thread only."""

    dim: int

    def token_counts(self, texts: Sequence[str]) -> list[int]: ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Shape (len(texts), dim), rows L2-normalised."""
        ...


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    queued_texts_max: int = 8_192
    queued_bytes_max: int = 32 * 1024 * 1024
    cache_bytes_max: int = 32 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Request:
    future: asyncio.Future[Vectors]
    loop: asyncio.AbstractEventLoop
    rows: Vectors
    missing: int


@dataclass(slots=True, eq=False)
class _Item:
    """One text that waits, with every place that its vector goes to."""

    key: bytes
    text: str
    size_bytes: int
    targets: list[tuple[_Request, int]] = field(default_factory=list)
    urgent: bool = False
    tokens: int = 0


class VectorCache:
    """Least recently used vectors by text digest, bounded in bytes."""

    ENTRY_OVERHEAD_BYTES = 300  # key, array header, dictionary slot

    def __init__(self, bytes_max: int, dim: int) -> None:
        self._entries: OrderedDict[bytes, Vectors] = OrderedDict()
        self._entries_max = bytes_max // (dim * 4 + self.ENTRY_OVERHEAD_BYTES)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Vectors | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, vector: Vectors) -> None:
        if self._entries_max <= 0:
            return
        self._entries[key] = vector
        self._entries.move_to_end(key)
        while len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)


class Batcher:
    """Joins the texts of all waiting requests into batches on one thread."""

    def __init__(self, engine: Engine, limits: BatchingLimits | None = None) -> None:
        self._engine = engine
        self._limits = limits or BatchingLimits()
        self._condition = threading.Condition()  # guards everything below
        self._cache = VectorCache(self._limits.cache_bytes_max, engine.dim)
        self._waiting: dict[bytes, _Item] = {}  # queued and not yet computed, by digest
        self._urgent: deque[_Item] = deque()
        self._patient: deque[_Item] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._counts = dict.fromkeys(
            ("texts", "tokens", "batches", "cache_hits", "refused", "busy_us"), 0
        )
        self._thread = threading.Thread(target=self._run, name="embedding", daemon=True)
        self._thread.start()

    async def embed(self, texts: Sequence[str], *, urgent: bool) -> Vectors:
        """Shape (len(texts), dim). Raises Overloaded, ShuttingDown, InternalError."""
        loop = asyncio.get_running_loop()
        rows = np.empty((len(texts), self._engine.dim), np.float32)
        request = _Request(loop.create_future(), loop, rows, 0)
        # A lone surrogate cannot reach the tokenizer; it becomes "?" in what is embedded.
        encoded = [text.encode("utf-8", "replace") for text in texts]
        keys = [hashlib.blake2b(data, digest_size=16).digest() for data in encoded]
        with self._condition:
            self._enqueue(request, keys, encoded, urgent)
        if request.missing == 0:
            return rows
        return await request.future

    def _enqueue(
        self, request: _Request, keys: list[bytes], encoded: list[bytes], urgent: bool
    ) -> None:
        if self._closing:
            raise ShuttingDown("This node is stopping and embeds no more texts.")
        new: dict[bytes, _Item] = {}
        joined: list[tuple[_Item, int]] = []
        for row, (key, data) in enumerate(zip(keys, encoded, strict=True)):
            if (vector := self._cache.get(key)) is not None:
                request.rows[row] = vector
                self._counts["cache_hits"] += 1
                continue
            item = self._waiting.get(key) or new.get(key)
            if item is None:
                item = new[key] = _Item(key, data.decode("utf-8"), len(data), urgent=urgent)
            joined.append((item, row))
        self._check_room(list(new.values()))
        for item, row in joined:
            item.targets.append((request, row))
            if urgent and not item.urgent:  # a query for a document that already waits
                item.urgent = True
                self._urgent.append(item)
        request.missing = len(joined)
        self._waiting.update(new)
        self._queued_bytes += sum(item.size_bytes for item in new.values())
        (self._urgent if urgent else self._patient).extend(new.values())
        if new:
            self._condition.notify()

    def _check_room(self, new: list[_Item]) -> None:
        # An empty queue takes a request of any size, else a large batch could never be served.
        if not self._waiting or not new:
            return
        texts = len(self._waiting) + len(new)
        size = self._queued_bytes + sum(item.size_bytes for item in new)
        if texts > self._limits.queued_texts_max or size > self._limits.queued_bytes_max:
            self._counts["refused"] += len(new)
            raise Overloaded(
                f"{len(self._waiting)} texts already wait to be embedded on this node.",
                hint="Retry after a moment, send smaller batches, or send vectors of your own.",
            )

    def _run(self) -> None:
        while (window := self._next_window()) is not None:
            try:
                self._compute(window, between=self._serve_urgent)
            except Exception as error:
                # One bad batch must fail its own requests, not end the thread of all others.
                self._fail(window, InternalError(f"The embedding model failed: {error!r}."))
        self._fail(list(self._waiting.values()), ShuttingDown("This node is stopping."))

    def _next_window(self) -> list[_Item] | None:
        with self._condition:
            while not (self._urgent or self._patient or self._closing):
                self._condition.wait()
            if self._closing:
                return None
            return self._take(self._urgent) or self._take(self._patient)

    def _take(self, queue: deque[_Item]) -> list[_Item]:
        """Up to a window of items that are still wanted. The condition is held."""
        window: list[_Item] = []
        while queue and len(window) < WINDOW_TEXTS_MAX:
            item = queue.popleft()
            if self._waiting.get(item.key) is not item:
                continue  # served already, through the other queue
            if all(request.future.done() for request, _ in item.targets):
                self._forget(item)  # everyone who asked has gone: a deadline, a closed connection
            else:
                window.append(item)
        return window

    def _compute(self, window: list[_Item], between: Callable[[], None] | None = None) -> None:
        for item, tokens in zip(
            window, self._engine.token_counts([item.text for item in window]), strict=True
        ):
            item.tokens = tokens
        for batch in _batches(sorted(window, key=lambda item: -item.tokens)):
            self._compute_batch(batch)
            if between is not None:
                between()
            if self._closing:
                return

    def _serve_urgent(self) -> None:
        """Queries that came while documents are being computed do not wait for all of them."""
        while True:
            with self._condition:
                window = self._take(self._urgent) if not self._closing else []
            if not window:
                return
            try:
                self._compute(window)
            except Exception as error:
                self._fail(window, InternalError(f"The embedding model failed: {error!r}."))

    def _compute_batch(self, batch: list[_Item]) -> None:
        batch = [item for item in batch if self._waiting.get(item.key) is item]
        if not batch:
            return
        started_ns = time.perf_counter_ns()
        vectors = self._engine.embed([item.text for item in batch])
        busy_us = (time.perf_counter_ns() - started_ns) // 1000
        if not np.isfinite(vectors).all():
            raise FloatingPointError("a vector is not finite")
        finished: list[_Request] = []
        with self._condition:
            self._counts["batches"] += 1
            self._counts["texts"] += len(batch)
            self._counts["tokens"] += sum(item.tokens for item in batch)
            self._counts["busy_us"] += busy_us
            for item, vector in zip(batch, vectors, strict=True):
                self._forget(item)
                # A copy: a row of `vectors` would keep the whole batch alive in the cache.
                self._cache.put(item.key, vector.copy())
                for request, row in item.targets:
                    request.rows[row] = vector
                    request.missing -= 1
                    if request.missing == 0:
                        finished.append(request)
        for request in finished:
            _deliver(request, _set_result, request)

    def _forget(self, item: _Item) -> None:
        if self._waiting.pop(item.key, None) is not None:
            self._queued_bytes -= item.size_bytes

    def _fail(self, items: list[_Item], error: AgentMemError) -> None:
        requests: list[_Request] = []
        with self._condition:
            for item in items:
                if self._waiting.get(item.key) is item:
                    self._forget(item)
                    requests.extend(request for request, _ in item.targets)
        for request in dict.fromkeys(requests):
            _deliver(request, _set_exception, request, error)

    def stats(self) -> dict[str, int]:
        with self._condition:
            return {
                **self._counts,
                "queued_texts": len(self._waiting),
                "queued_bytes": self._queued_bytes,
                "cached_texts": len(self._cache),
            }

    async def close(self) -> None:
        """Finish the batch in hand, answer the rest with ShuttingDown, end the thread."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        await asyncio.to_thread(self._thread.join, CLOSE_WAIT_S)


def _batches(by_length: Sequence[_Item]) -> list[list[_Item]]:
    """Cuts items sorted by token count, longest first, so that a batch's first sets its padding."""
    batches: list[list[_Item]] = []
    for item in by_length:
        if batches:
            last = batches[-1]
            padded = last[0].tokens * (len(last) + 1)
            if len(last) < BATCH_TEXTS_MAX and padded <= BATCH_TOKENS_MAX:
                last.append(item)
                continue
        batches.append([item])
    return batches


def _deliver(request: _Request, action: Callable[..., None], *arguments: Any) -> None:
    try:
        request.loop.call_soon_threadsafe(action, *arguments)
    except RuntimeError:
        pass  # the loop of the one who asked is closed: nobody waits


def _set_result(request: _Request) -> None:
    if not request.future.done():
        request.future.set_result(request.rows)


def _set_exception(request: _Request, error: AgentMemError) -> None:
    if not request.future.done():
        request.future.set_exception(error)
