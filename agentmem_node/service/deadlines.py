"""Waiting no longer than a request's deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from agentmem_cluster.errors import DeadlineExceeded

T = TypeVar("T")


async def within(work: Awaitable[T], seconds: float) -> T:
    """What `work` gives, within `seconds`. Raises DeadlineExceeded; `work` is then cancelled."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise DeadlineExceeded(
            "The deadline of the request passed before it was finished.",
            hint="Retry with the same Idempotency-Key, or allow more time.",
        ) from None
