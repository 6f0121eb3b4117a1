"""A few transfers at once, their results in order: a store answers slowly, but many at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

# Enough to hide a bucket's answer times; few, because compressing takes a core from requests.
AT_ONCE: Final = 3


def in_order(work: Callable[[int], T], count: int, name: str) -> Iterator[T]:
    """`work(0)`, `work(1)`, ... done by a few threads. What one raises is raised, and no further
    one is begun; those under way are waited for."""
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix=name) as pool:
        try:
            for number in range(count):
                running.append(pool.submit(work, number))
                if len(running) > AT_ONCE:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
