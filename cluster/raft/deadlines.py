"""Deadlines for many short waits: a bucket per twentieth of a second instead of a timer each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from agentmem_cluster.runtime import Clock

T = TypeVar("T")
BUCKETS_PER_S = 20
FOREVER_S = 1e12


class Deadlines:
    """Fails futures whose time is up, at most one bucket late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[int, dict[asyncio.Future[Any], Callable[[], Exception]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for bucket in list(self._buckets):
            self._fail(bucket)

    async def wait(
        self, future: asyncio.Future[T], deadline_s: float, error: Callable[[], Exception]
    ) -> T:
        """The future's result; `error()` is raised when `deadline_s` on the clock comes first."""
        bucket = int(min(deadline_s, FOREVER_S) * BUCKETS_PER_S) + 1
        waiting = self._buckets.get(bucket)
        if waiting is None:
            waiting = self._buckets[bucket] = {}
        waiting[future] = error
        if self._timer is None:
            self._arm()
        try:
            return await future
        finally:
            waiting.pop(future, None)

    def _arm(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(1 / BUCKETS_PER_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self._clock.monotonic() * BUCKETS_PER_S
        for bucket in [b for b in self._buckets if b <= now]:
            self._fail(bucket)
        if any(self._buckets.values()):
            self._arm()
        else:
            self._buckets.clear()

    def _fail(self, bucket: int) -> None:
        waiting = self._buckets.pop(bucket)
        for future, error in list(waiting.items()):
            if not future.done():
                future.set_exception(error())
