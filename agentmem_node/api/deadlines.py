"""No request outlives its deadline: whoever does is cancelled by one sweep over all.

A timer for each request would cost more than the whole rest of the dispatch. The service ends
requests at their deadline by itself; this is for what it waits for in vain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The service answers better than a cancellation does, so it is given a moment more.
_GRACE_S = 0.25
_SWEEP_S = 0.1


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in flight."""

    task: asyncio.Task[Any]
    ends_at: float
    is_cancelled: bool = False


class Deadlines:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tickets: dict[int, Ticket] = {}
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None

    def enter(self, ends_at: float) -> Ticket:
        """Watch the current task until `leave`."""
        task = asyncio.current_task()
        assert task is not None
        ticket = Ticket(task, ends_at)
        self._tickets[id(ticket)] = ticket
        return ticket

    def leave(self, ticket: Ticket) -> None:
        del self._tickets[id(ticket)]

    def overran(self, ticket: Ticket) -> bool:
        """Whether the cancellation that arrived is ours; it is then used up."""
        return ticket.is_cancelled and ticket.task.uncancel() == 0

    def cancel_all(self) -> None:
        for ticket in self._tickets.values():
            self._cancel(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.is_cancelled:
            ticket.is_cancelled = True
            ticket.task.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self._clock()
            for ticket in list(self._tickets.values()):
                if ticket.ends_at + _GRACE_S < now:
                    self._cancel(ticket)
