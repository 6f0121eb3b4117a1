"""Archiving the log of the shards that this node leads, for restores to any moment.

Every few seconds, what was committed since is written as one object. A new leader goes on where
the archive ends; the replicas keep in their journals what is not archived yet (up to a bound), so
that it can. Whatever was thrown away before it was archived is a gap, and is said loudly: moments
within it cannot be restored, and the next backup ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from agentmem_cluster.errors import AgentMemError, InternalError
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.runtime import Clock
from agentmem_node.backup.archive import Archive, Gap, Reached
from agentmem_node.backup.objects import open_store
from agentmem_node.service.routing import LocalShard, Routing

log = logging.getLogger("agentmem.archive")

_SEGMENT_BYTES = 4 << 20
# What is kept of one epoch that ended before all of it was archived.
_ENDED_BYTES_MAX = 64 << 20
_WAIT_ROUNDS = 3
# A shard that is idle says so this often; a shard that is busy, with each segment.
_MARK_S = 10.0
_CONFIRM_S = 2.0
# How often a replica that does not lead looks how far the archive is, in rounds.
_FOLLOW_ROUNDS = 10


@dataclass(slots=True)
class _Place:
    """How far the archive of one shard's epoch is, as far as this node knows."""

    epoch: int
    last: int
    name: str  # of the last segment that was seen
    is_known: bool = False  # by looking, since this node began to lead
    marked_s: float = float("-inf")


@dataclass(slots=True)
class _Ended:
    """What an epoch's log held, when it ended here, beyond what was archived."""

    shard: str
    epoch: int
    slots: tuple[int, int]
    entries: list[Entry]
    rounds: int  # to wait, so that of several members usually one uploads it


class Archiver:
    def __init__(
        self,
        routing: Routing,
        clock: Clock,
        *,
        url: str,
        period_s: float,
        cluster_id: Callable[[], str | None],
    ) -> None:
        self.url = url
        self.gaps: list[tuple[str, Gap]] = []
        self.fault: str | None = None  # why the last round did not succeed
        self._routing = routing
        self._clock = clock
        self._period_s = period_s
        self._cluster_id = cluster_id
        self._archive: Archive | None = None
        self._places: dict[str, _Place] = {}
        self._ended: list[_Ended] = []
        self._rounds = 0

    def leaving(self, local: LocalShard) -> None:
        """The epoch of a replica ends here, and its log is dropped: keep what is not archived.

        In memory alone. Every member does, so one that goes on is enough.
        """
        shard, epoch = local.info.id, local.info.epoch
        place = self._place(shard, local)
        entries: list[Entry] = []
        size = 0
        try:
            # A node that has not looked at the archive since its start keeps what it has.
            begin = max(place.last, local.group.status().first_index - 1)
            while size < _ENDED_BYTES_MAX:
                after = entries[-1].index if entries else begin
                found = local.group.read_log(after, _SEGMENT_BYTES)
                if not found:
                    break
                entries += found
                size += sum(len(entry.command) for entry in found)
        except (IndexError, KeyError):
            pass  # the next epoch's leader sees the gap, unless another member had it all
        if entries:
            slots = (local.info.slot_start, local.info.slot_end)
            rounds = 0 if local.group.is_leader else _WAIT_ROUNDS
            self._ended.append(_Ended(shard, epoch, slots, entries, rounds))

    async def run(self) -> None:
        """For ever. A store that does not answer is asked again; nothing is lost meanwhile."""
        while True:
            await asyncio.sleep(self._period_s)
            cluster_id = self._cluster_id()
            if cluster_id is None:
                continue
            if self._archive is None or self._archive.cluster_id != cluster_id:
                try:
                    store = await asyncio.to_thread(open_store, self.url)
                except AgentMemError as error:
                    self._failed("the store", error)
                    continue
                self._archive = Archive(store, cluster_id)
            await self._round(self._archive)

    async def _round(self, archive: Archive) -> None:
        self._rounds += 1
        failed = not await self._end_epochs(archive)
        for shard, local in list(self._routing.local.items()):
            try:
                if local.group.is_leader:
                    await self._lead(archive, shard, local)
                else:
                    await self._follow(archive, shard, local)
            except Exception as error:
                # Whatever it is, it must not end the archiving of the other shards.
                if not isinstance(error, AgentMemError | OSError):
                    log.exception("archiving the log of %s failed", shard)
                failed = True
                self._failed(shard, error)
                if shard in self._places:
                    # A segment may have been written all the same: look before reading on.
                    self._places[shard].is_known = False
        for gone in self._places.keys() - self._routing.local.keys():
            del self._places[gone]
        if not failed and self.fault is not None:
            log.warning("the log is archived again at %s", self.url)
            self.fault = None

    async def _end_epochs(self, archive: Archive) -> bool:
        """Write the ends of epochs that nobody has written yet. False when one failed."""
        for ended in list(self._ended):
            if ended.rounds > 0:
                ended.rounds -= 1
                continue
            try:
                found = await asyncio.to_thread(archive.segments, ended.shard, ended.epoch)
                last = max((segment.last for segment in found), default=0)
                missing = [entry for entry in ended.entries if entry.index > last]
                if missing:
                    await asyncio.to_thread(
                        archive.append, ended.shard, ended.epoch, missing, ended.slots
                    )
            except (AgentMemError, OSError) as error:
                self._failed(ended.shard, error)
                return False
            self._ended.remove(ended)
        return True

    async def _lead(self, archive: Archive, shard: str, local: LocalShard) -> None:
        place = self._place(shard, local)
        if not place.is_known:
            await self._look(archive, shard, local, place)
            place.is_known = True
        # Before the entries are read: what is decided by now may be committed after them.
        now_ms = self._clock.wall_ms()
        knows_all = await self._knows_all(local)
        is_news = False
        while True:
            try:
                entries = local.group.read_log(place.last, _SEGMENT_BYTES)
            except IndexError:
                self._gap(shard, local, place)
                continue
            if not entries:
                break
            slots = (local.info.slot_start, local.info.slot_end)
            segment = await asyncio.to_thread(archive.append, shard, place.epoch, entries, slots)
            place.last, place.name = segment.last, segment.name
            is_news = True
        local.group.retain(place.last)
        now_s = self._clock.monotonic()
        if not knows_all or not local.group.is_leader:
            return
        if is_news or now_s - place.marked_s >= _MARK_S:
            reached = Reached(place.epoch, place.last, now_ms)
            await asyncio.to_thread(archive.mark, shard, reached)
            place.marked_s = now_s

    async def _knows_all(self, local: LocalShard) -> bool:
        """Whether all that was answered before this call is applied here: a new leader has to learn
        what the one before it committed, and a new epoch's log has to say first where it began."""
        try:
            await local.group.read_index(deadline=self._clock.monotonic() + _CONFIRM_S)
        except AgentMemError as error:
            log.debug("how far the archive of %s is cannot be said now: %s", local.info.id, error)
            return False
        return local.machine.has_begun

    async def _follow(self, archive: Archive, shard: str, local: LocalShard) -> None:
        """Keep in the journal what the archive lacks: this node may have to write it."""
        place = self._place(shard, local)
        place.is_known = False
        if self._rounds % _FOLLOW_ROUNDS == 1:
            await self._look(archive, shard, local, place)
            local.group.retain(place.last)

    async def _look(self, archive: Archive, shard: str, local: LocalShard, place: _Place) -> None:
        found = await asyncio.to_thread(archive.segments, shard, place.epoch, place.name)
        for segment in found:
            place.last = max(place.last, segment.last)
            place.name = max(place.name, segment.name)
        if not place.name and local.group.status().first_index > place.last + 1:
            # Archiving has only just been turned on: what came before belongs to no archive.
            place.last = local.group.status().first_index - 1

    def _place(self, shard: str, local: LocalShard) -> _Place:
        place = self._places.get(shard)
        if place is None or place.epoch != local.info.epoch:
            place = _Place(local.info.epoch, local.group.spec.base_index, "")
            self._places[shard] = place
        return place

    def _gap(self, shard: str, local: LocalShard, place: _Place) -> None:
        first = local.group.status().first_index
        if first <= place.last + 1:
            raise InternalError(f"The log of shard {shard} cannot be read after {place.last}.")
        gap = Gap(place.last + 1, first - 1)
        place.last = first - 1
        self.gaps.append((shard, gap))
        log.error(
            "entries %d to %d of shard %s were thrown away before they were archived: moments "
            "within them cannot be restored. Make a backup now, which ends the gap.",
            gap.first,
            gap.last,
            shard,
        )

    def _failed(self, what: str, error: Exception) -> None:
        text = f"{what}: {error}"
        if self.fault is None:
            log.error("the log is not archived: %s; trying again", text)
        self.fault = text

    def status(self) -> dict[str, object]:
        """What of the archive this node knows."""
        return {
            "url": self.url,
            "fault": self.fault,
            "gaps": [f"{shard}: entries {gap.first} to {gap.last}" for shard, gap in self.gaps],
            "behind": {
                shard: max(0, local.group.status().applied_index - self._places[shard].last)
                for shard, local in self._routing.local.items()
                if local.group.is_leader and shard in self._places
            },
        }
