"""Where shards are and who leads them: one object that reads and writes ask before they act.

A request that concerns a shard is served here when this node can, and otherwise forwarded once
over the peer link. While a shard has no leader (an election takes about a second) a request
waits for one, within its own deadline, and no longer than `leader_wait_s_max`: a minority
refuses rather than keep its callers hanging.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agentmem_cluster.epochs.commands import Sealed
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.errors import (
    DeadlineExceeded,
    MapMoved,
    NoQuorum,
    NotLeader,
    Overloaded,
    ShuttingDown,
    Unavailable,
    WrongShard,
)
from agentmem_cluster.link.link import Link
from agentmem_cluster.raft.api import Applied
from agentmem_cluster.raft.host import AsyncGroup
from agentmem_cluster.ring import SLOTS
from agentmem_cluster.runtime import Clock
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.engine.shard import Shard
from agentmem_node.model.search import SearchQuery
from agentmem_node.service.hold import Hold

# Long enough for an election and most second ones (timeouts are 0.5 to 1.0 s), short enough that a
# minority has said no within 2 s on a busy machine, too.
_LEADER_WAIT_S_MAX = 1.5
_LEADER_POLL_S = 0.02
# A leader that stopped answers nothing, and its link is given up only after a while; its successor
# may be known before. Looked at from the first time on, and again, while a leader is waited for.
_REPLACED_LOOK_S_FIRST = 0.1
_REPLACED_LOOK_S = 0.05
# What the reply needs to come back after the remote side's own deadline has fired.
_REPLY_MARGIN_S = 0.05

T = TypeVar("T")


@dataclass(slots=True)
class LocalShard:
    """A shard that has a replica on this node."""

    info: ShardInfo
    group: AsyncGroup
    shard: Shard
    machine: EpochMachine
    hold: Hold = field(default_factory=Hold)
    # Something in it is not what was written; it may hide what it should show.
    is_damaged: bool = False

    @property
    def is_asked_last(self) -> bool:
        """Others answer reads, as long as there are any."""
        return self.is_damaged or self.group.needs_reseed

    @property
    def is_left_to_others(self) -> bool:
        """A peer that asks it is sent on: it would give its leadership to one that is whole, so if
        it leads, there is none."""
        return self.is_damaged and not self.group.is_leader

    async def propose(self, command: bytes, deadline: float) -> Applied:
        """Replicate and apply a command. Raises WrongShard, certainly not done, when the epoch of
        this replica has ended or has not begun: the caller tries again, wherever the shard is."""
        if self.group.is_leader and not self.machine.accepts:
            raise self._moving()
        applied = await self.hold.propose(self.group, command, deadline)
        if isinstance(applied.result, Sealed):
            raise self._moving()
        return applied

    def check_slots(self, first: int, last: int) -> None:
        """Raises MapMoved, certainly not done, when they are not all this shard's any more."""
        if not self.info.slot_start <= first <= last < self.info.slot_end:
            raise MapMoved(
                f"Shard {self.info.id} was split: a part of the request belongs to another now.",
                hint="Fetch the shard map again.",
            )

    def _moving(self) -> WrongShard:
        return WrongShard(
            f"Shard {self.info.id} is between two epochs.", hint="Retry: it takes a moment."
        )

    async def build(self, query: SearchQuery) -> None:
        """Have in memory what the query's search needs, without holding up the loop meanwhile.

        Nothing to do, and no turn of the loop lost, when it is there.
        """
        for _ in self.shard.index.build_steps(query):
            await asyncio.sleep(0)


class Routing:
    def __init__(self, node_id: str, link: Link | None, clock: Clock) -> None:
        self.node_id = node_id
        self.local: dict[str, LocalShard] = {}
        self.map: ShardMap | None = None
        self.roots = 0  # shards before any was split
        self._link = link
        self._clock = clock
        self._leader_hints: dict[str, str] = {}
        self._asked = 0
        # Called when a peer knows a newer map than this node.
        self.on_stale_map: Callable[[], None] = lambda: None

    # -- what is where ------------------------------------------------------------------

    def current_map(self) -> ShardMap:
        """The shard map. Raises Unavailable while this node has not learnt it yet."""
        if self.map is None:
            raise Unavailable(
                "This node has not learnt the shard map yet.",
                hint="It is still starting, or cannot reach a majority of the cluster.",
            )
        return self.map

    def shard_of(self, tenant: str, owner: str) -> str:
        return self.current_map().shard_of(tenant, owner).id

    def shard_of_slot(self, slot: int) -> str:
        return self.current_map().shard_of_slot(slot).id

    def root_of_slot(self, slot: int) -> str:
        """The shard that the slot was in before any was split.

        Parts of a request are named by it: a retry after a split names the same parts.
        """
        roots = self.roots or len(self.current_map().shards)
        return f"s{(slot * roots + roots - 1) // SLOTS:02d}"

    def leader_of(self, shard_id: str) -> str | None:
        """The node that leads a shard, as far as this node knows."""
        here = self.local.get(shard_id)
        if here is not None:
            return here.group.leader
        return self._leader_hints.get(shard_id)

    def learn_leaders(self, leaders: Any) -> None:
        """Shard -> leader, as a member of shards without a replica here says it."""
        if self.map is None or not isinstance(leaders, dict):
            return
        for shard_id, info in self.map.shards.items():
            leader = leaders.get(shard_id)
            if leader in info.members and shard_id not in self.local:
                self._leader_hints[shard_id] = leader

    def serve(self, local: LocalShard) -> None:
        """A replica is served here from now on, instead of another epoch's perhaps."""
        self.local[local.info.id] = local
        self._leader_hints.pop(local.info.id, None)

    def check_epoch(self, shard_id: str, epoch: int) -> LocalShard:
        """The local replica that a peer's call names. Raises WrongShard when it is not here."""
        here = self.local.get(shard_id)
        if here is None or here.info.epoch != epoch:
            version = 0 if self.map is None else self.map.version
            raise WrongShard(
                f"Node {self.node_id} does not serve shard {shard_id} at epoch {epoch}.",
                hint="Fetch the shard map again.",
                map_version=version,
            )
        return here

    def remaining(self, deadline: float) -> float:
        """Seconds left. Raises DeadlineExceeded when none are."""
        left = deadline - self._clock.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                "The deadline of the request passed before it was finished.",
                hint="Retry with the same Idempotency-Key, or allow more time.",
            )
        return left

    # -- acting -------------------------------------------------------------------------

    async def through_moves(self, deadline: float, attempt: Callable[[], Awaitable[T]]) -> T:
        """`attempt`, begun again when the shards that it concerns were cut or moved meanwhile.

        A write must carry its request id: what it has done already is then not done twice.
        """
        until = min(deadline, self._clock.monotonic() + _LEADER_WAIT_S_MAX)
        while True:
            before = self.current_map()
            try:
                result = await attempt()
                if self.map is before or list(self.current_map().shards) == list(before.shards):
                    return result
            except MapMoved:
                if self._clock.monotonic() >= until:
                    raise
            self.on_stale_map()
            await asyncio.sleep(_LEADER_POLL_S)

    async def at_leader(
        self,
        shard_id: str,
        deadline: float,
        here: Callable[[LocalShard], Awaitable[T]],
        there: Callable[[str, ShardInfo], Awaitable[T]],
    ) -> T:
        """Run `here` when this node leads the shard, else `there(leader, info)`.

        NotLeader, WrongShard and NoQuorum are certainly-not-done outcomes, so the call goes on
        with the next leader until the deadline. So it does when a leader went away with the
        request: what is sent again carries the same request id, and the ledger answers what became
        of it. From then on a refusal says nothing about the first try, and is told as what it is:
        unknown.
        Everything else is the caller's.
        """
        give_up = min(deadline, self._clock.monotonic() + _LEADER_WAIT_S_MAX)
        is_unknown = False
        while True:
            local = self.local.get(shard_id)
            try:
                if local is not None and local.group.is_leader:
                    return await here(local)
                leader = self._next_leader(shard_id)
                if leader is not None and leader != self.node_id:
                    info = self.current_map().shards[shard_id]
                    return await self._while_it_leads(shard_id, leader, there(leader, info))
            except NotLeader as error:
                if error.leader:
                    self._leader_hints[shard_id] = error.leader
                else:
                    self._leader_hints.pop(shard_id, None)
            except WrongShard:
                self._leader_hints.pop(shard_id, None)
                self.on_stale_map()
            except (Unavailable, Overloaded) as error:
                went_away = type(error) is Unavailable or isinstance(error, ShuttingDown)
                # A leader that just lost its majority has done nothing: the next one may.
                if not (went_away or is_unknown or isinstance(error, NoQuorum)):
                    raise
                if went_away and not is_unknown:
                    # Its successor is elected from now on.
                    give_up = min(deadline, self._clock.monotonic() + _LEADER_WAIT_S_MAX)
                    is_unknown = True
                self._leader_hints.pop(shard_id, None)
            if self._clock.monotonic() >= give_up:
                self.remaining(deadline)
                if is_unknown:
                    raise DeadlineExceeded(
                        f"The leader of shard {shard_id} was lost before it answered, and no other "
                        "has answered since; a write may or may not have taken effect.",
                        hint="Retry with the same Idempotency-Key.",
                        shard=shard_id,
                    )
                raise NoQuorum(
                    f"Shard {shard_id} has no leader that this node can reach.",
                    hint="A majority of its replicas must be up: see `agentmem cluster status`.",
                    shard=shard_id,
                )
            await asyncio.sleep(_LEADER_POLL_S)

    async def _while_it_leads(self, shard_id: str, leader: str, answer: Awaitable[T]) -> T:
        """What that leader answers. Raises Unavailable once another one leads instead.

        It is not left at the first sight of a successor: one that handed its shard over in good
        order is about to answer.
        """
        loop = asyncio.get_running_loop()
        sightings = 0
        looking: asyncio.TimerHandle

        def look() -> None:
            nonlocal looking, sightings
            sightings = sightings + 1 if self.leader_of(shard_id) not in (None, leader) else 0
            if sightings > 1:
                scope.reschedule(loop.time())
            else:
                looking = loop.call_later(_REPLACED_LOOK_S, look)

        looking = loop.call_later(_REPLACED_LOOK_S_FIRST, look)
        try:
            async with asyncio.timeout(None) as scope:
                return await answer
        except TimeoutError:
            if not scope.expired():
                raise
            raise Unavailable(
                f"Node {leader} no longer leads shard {shard_id} and has not answered.",
                hint="The outcome is unknown: retry with the same request id.",
            ) from None
        finally:
            looking.cancel()

    def _next_leader(self, shard_id: str) -> str | None:
        """Whom to send to now; None: wait. Never somebody who cannot be reached, because a leader
        that died stays in the hint of every node that has no replica."""
        known = self.leader_of(shard_id)
        if known is not None and self.is_connected(known):
            return known
        if shard_id in self.local:
            return None  # its own replica will learn the next leader
        # Not a member: ask a member, another one each time, who answers or names the leader.
        members = self.current_map().shards[shard_id].members
        candidates = [m for m in members if self.is_connected(m)]
        self._asked += 1
        return candidates[self._asked % len(candidates)] if candidates else None

    def is_connected(self, peer: str) -> bool:
        return peer == self.node_id or (self._link is not None and self._link.is_up(peer))

    async def call(self, peer: str, method: str, body: dict[str, Any], deadline: float) -> Any:
        """One call to a peer, under the request's deadline (its milliseconds travel as `left_ms`).

        Raises the peer's error, Unavailable when it is not connected, DeadlineExceeded.
        """
        if self._link is None:
            raise Unavailable(f"Node {peer} is unknown: this node runs alone.")
        left = self.remaining(deadline)
        body["left_ms"] = max(1, int((left - _REPLY_MARGIN_S) * 1000))
        return await self._link.call(peer, method, body, timeout=left)

    def replica_for_read(self, shard_id: str, avoid: Iterable[str] = ()) -> str | None:
        """This node when it has a replica, else a connected member, the leader first.

        A replica that waits to be made anew is asked last.
        """
        avoided = set(avoid)
        here = self.local.get(shard_id)
        if self.node_id in avoided:
            here = None
        if here is not None and not here.is_asked_last:
            return self.node_id
        info = self.current_map().shards[shard_id]
        order = sorted(info.members, key=lambda m: m != self._leader_hints.get(shard_id))
        for member in order:
            if member not in avoided and member != self.node_id and self.is_connected(member):
                return member
        return None if here is None else self.node_id
