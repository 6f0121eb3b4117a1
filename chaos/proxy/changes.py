"""A counter that can be waited for: what sleeps on behalf of a toxic wakes when toxics change."""

from __future__ import annotations

import asyncio


class Changes:
    def __init__(self) -> None:
        self.count = 0
        self._condition = asyncio.Condition()

    async def note(self) -> None:
        self.count += 1
        async with self._condition:
            self._condition.notify_all()

    async def after(self, seen: int, seconds: float | None) -> None:
        """Return when the count is no longer `seen`, or after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._condition:
                await self._condition.wait_for(lambda: self.count != seen)
        except TimeoutError:
            pass
