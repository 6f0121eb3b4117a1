"""What a node does for the shards that it leads while the cluster changes shape: it begins an epoch
once the one before is closed, and gives a leadership away when its own replica is damaged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.commands import Begin, encode
from agentmem_cluster.epochs.fence import is_fenced
from agentmem_cluster.epochs.replicas import ReplicaSet, Served
from agentmem_cluster.errors import AgentMemError, DeadlineExceeded
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link.link import Link
from agentmem_cluster.runtime import Clock
from agentmem_cluster.shardmap import ShardInfo
from agentmem_node.service.routing import LocalShard, Routing

log = logging.getLogger("agentmem.replicas")

_POLL_S: Final = 0.01
_RETRY_S: Final = 1.0
_CALL_S: Final = 2.0


class Leading:
    def __init__(
        self,
        replicas: ReplicaSet,
        link: Link | None,
        routing: Routing,
        clock: Clock,
        *,
        view_wire: Callable[[], Any],
        origin_of: Callable[[ShardInfo, str], bytes],
    ) -> None:
        """`view_wire()`: how this node sees the cluster, for a peer that is behind.
        `origin_of(info, source)`: the entry by which the log of a shard that came out of a backup
        says so."""
        self._set = replicas
        self._link = link
        self._routing = routing
        self._clock = clock
        self._view_wire = view_wire
        self._origin_of = origin_of
        self._beginning: dict[str, asyncio.Task[None]] = {}
        self._resigning: dict[str, asyncio.Task[None]] = {}

    def step(self, damaged: Iterable[str]) -> None:
        """Take up what this node leads now. `damaged`: shards whose replica here is."""
        for shard, served in self._set.served.items():
            local = self._led(shard)
            if local is None or served.machine.has_begun:
                continue
            if shard not in self._beginning:
                self._start(self._beginning, shard, self._begin(local, served))
        for shard in damaged:
            local = self._led(shard)
            if local is not None and shard not in self._resigning:
                self._start(self._resigning, shard, self._resign(local))

    async def stop(self) -> None:
        tasks = [*self._beginning.values(), *self._resigning.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _led(self, shard: str) -> LocalShard | None:
        local = self._routing.local.get(shard)
        return local if local is not None and local.group.is_leader else None

    def _start(
        self, tasks: dict[str, asyncio.Task[None]], shard: str, work: Coroutine[Any, Any, None]
    ) -> None:
        task = asyncio.create_task(work, name=f"leading-{shard}")
        tasks[shard] = task
        task.add_done_callback(lambda _: tasks.pop(shard, None))

    # -- beginning an epoch ----------------------------------------------------------------------

    async def _begin(self, local: LocalShard, served: Served) -> None:
        shard, info = served.info.id, served.info
        change = next((c for c in self._set.changes.values() if c.target_of(shard) == info), None)
        if change is None:
            return
        closed: set[str] = set()
        while local.group.is_leader and not served.machine.has_begun:
            await asyncio.gather(
                *(
                    self._ask_to_close(member, change, closed)
                    for member in change.old_members
                    if member not in closed
                )
            )
            if is_fenced(change.old_members, closed):
                failpoint("epoch.after_fence")
                try:
                    if change.source:
                        await self._say_origin(local, change.source)
                    deadline = self._clock.monotonic() + _CALL_S
                    await local.group.propose(encode(Begin(info.epoch)), deadline=deadline)
                    failpoint("epoch.after_begin")
                except AgentMemError as error:
                    log.info("epoch %d of %s does not begin yet: %s", info.epoch, shard, error)
                continue
            await asyncio.sleep(_POLL_S)

    async def _say_origin(self, local: LocalShard, source: str) -> None:
        deadline = self._clock.monotonic() + _CALL_S
        entry = self._origin_of(local.info, source)
        # If it takes long it is in the log all the same, before the entry that begins the epoch.
        with suppress(DeadlineExceeded):
            await local.group.propose(entry, deadline=deadline)

    async def _ask_to_close(self, member: str, change: Change, closed: set[str]) -> None:
        if member == self._set.node_id:
            if self._set.close(change.shard, change.from_epoch):
                closed.add(member)
            return
        if self._link is None or not self._routing.is_connected(member):
            return
        body = {"shard": change.shard, "epoch": change.from_epoch, "view": self._view_wire()}
        try:
            if await self._link.call(member, "replica.close", body, timeout=_CALL_S):
                closed.add(member)
        except AgentMemError as error:
            log.debug("%s has not closed %s: %s", member, change.shard, error)

    # -- giving a leadership away ----------------------------------------------------------------

    async def _resign(self, local: LocalShard) -> None:
        """To a member whose replica is whole: what this one cannot read, nobody could write.
        Without any it goes on, with what is whole."""
        shard = local.info.id
        for member in local.info.members:
            if member == self._set.node_id or self._link is None:
                continue
            try:
                await self._link.call(member, "shard.may_lead", {"shard": shard}, timeout=_CALL_S)
                deadline = self._clock.monotonic() + _CALL_S
                await local.group.transfer(member, deadline=deadline)
                return
            except AgentMemError as error:
                log.debug("%s does not take the leadership of %s: %s", member, shard, error)
        await asyncio.sleep(_RETRY_S)
