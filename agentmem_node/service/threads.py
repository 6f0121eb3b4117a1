"""Blocking work that a task gives to a thread, and does not leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`; but who cancels the task waits for the thread, which cannot be
    cancelled: what it still writes or renames must not meet what is begun next."""
    return await unless_called_off(lambda: None, work, *args, **kwargs)


async def unless_called_off(
    call_off: Callable[[], None], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """`to_its_end`, of work that ends early once `call_off` was called."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        call_off()
        await until_over(running)
        if not running.cancelled():
            running.exception()  # nobody asks for it any more
        raise


async def until_over(task: asyncio.Future[Any]) -> None:
    """Wait for a task, whoever is impatient meanwhile: a cancellation counts afterwards."""
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
