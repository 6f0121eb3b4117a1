"""Holding up the writes of one shard for a moment, so that several shards stand still at once.

Writes that arrive meanwhile wait and go on; none is refused. A hold ends by itself after its
lease: whoever asked for it may be dead.
"""

from __future__ import annotations

import asyncio

from agentmem_cluster.errors import Conflict, DeadlineExceeded
from agentmem_cluster.raft.api import Applied
from agentmem_cluster.raft.host import AsyncGroup


class Hold:
    """One shard's, on its leader. All proposals of commands go through `propose`."""

    def __init__(self) -> None:
        self._under_way = 0
        self._holder = ""
        self._released: asyncio.Event | None = None
        self._idle: asyncio.Event | None = None
        self._lease: asyncio.TimerHandle | None = None

    async def propose(self, group: AsyncGroup, command: bytes, deadline: float) -> Applied:
        """`group.propose`, once nobody holds the shard; its errors."""
        while self._released is not None:
            # Bounded by the lease, which is far below any request's deadline.
            await self._released.wait()
        self._under_way += 1
        try:
            return await group.propose(command, deadline=deadline)
        finally:
            self._under_way -= 1
            if self._under_way == 0 and self._idle is not None:
                self._idle.set()

    async def begin(self, holder: str, lease_s: float) -> None:
        """Let no further write begin, and return when those under way have ended.

        Raises Conflict while another holds the shard, DeadlineExceeded when the lease ended first.
        """
        if self._holder:
            raise Conflict("Another backup holds this shard at the moment.", hint="Try again.")
        self._holder = holder
        self._released = asyncio.Event()
        self._idle = asyncio.Event()
        idle, released = self._idle, self._released
        self._lease = asyncio.get_running_loop().call_later(lease_s, self.release, holder)
        if self._under_way == 0:
            return
        ended = [asyncio.ensure_future(event.wait()) for event in (idle, released)]
        try:
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            self.release(holder)
            raise
        finally:
            for waiter in ended:
                waiter.cancel()
        if not self.is_held_by(holder):
            raise DeadlineExceeded(
                f"Writes that were under way did not end within {lease_s:.1f} s.", hint="Try again."
            )

    def is_held_by(self, holder: str) -> bool:
        """False once the lease has ended."""
        return self._holder == holder

    def release(self, holder: str) -> bool:
        """Let writes go on. False: this holder held nothing any more."""
        if self._holder != holder:
            return False
        self._holder = ""
        if self._lease is not None:
            self._lease.cancel()
        if self._released is not None:
            self._released.set()
        self._released = self._idle = self._lease = None
        return True
