"""Making a backup of the whole cluster: one moment for all shards, then each leader uploads.

The manifest is written last, by the node that was asked. A backup that is interrupted anywhere
before it is not there; the chunks that it has uploaded are used by the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    Conflict,
    DeadlineExceeded,
    NoQuorum,
    Unavailable,
)
from agentmem_cluster.runtime import Clock, Rng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.backup import catalog
from agentmem_node.backup.catalog import NOTICE_S, Notice
from agentmem_node.backup.errors import BackupUnreachable
from agentmem_node.backup.manifest import Manifest, Model, ShardBackup, encode, manifest_name
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.service.routing import Routing
from agentmem_node.service.view import View

log = logging.getLogger("agentmem.backup")

T = TypeVar("T")
Call = Callable[[str, dict[str, Any]], Awaitable[Any]]

# Elections take about a second, so a few tries see the end of one.
_CUT_ATTEMPTS_MAX = 8
_CUT_PAUSE_S = 0.4
_LEADERS_S_MAX = 15.0
_CALL_S = 10.0
# What a poll may take beyond what it waits for.
_POLL_S = 2.0
_SILENCE_S_MAX = 12.0
_PROBE_S = 30.0

_shard_decoder = msgspec.msgpack.Decoder(ShardBackup)


class Told:
    """How a backup goes on; what the API shows of it is made from this."""

    def __init__(self) -> None:
        self.phase = "beginning"
        self.done: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self.moved: dict[str, int] = {}


class BackupMaker:
    """Makes backups, asking the leaders of the shards over the link."""

    def __init__(
        self,
        node_id: str,
        routing: Routing,
        own_calls: Mapping[str, Call],
        *,
        clock: Clock,
        rng: Rng,
        version: str,
        cluster_name: str,
        view: Callable[[], View],
        hold_ms_max: int,
    ) -> None:
        self._node_id = node_id
        self._routing = routing
        self._own_calls = own_calls
        self._clock = clock
        self._rng = rng
        self._version = version
        self._cluster_name = cluster_name
        self._view = view
        self._hold_ms_max = hold_ms_max

    async def make(self, url: str, *, full: bool, backup_id: str, told: Told) -> Manifest:
        """Raises BackupBusy, BackupUnreachable, NoQuorum (a shard without a leader), and what
        the nodes raise. Nothing of the backup is then to be seen."""
        store = await asyncio.to_thread(open_store, url)
        notice = await asyncio.to_thread(
            Notice.begin, store, "create", backup_id, self._clock.wall_ms
        )
        renewing = asyncio.create_task(self._renew(notice), name="backup-notice")
        try:
            return await self._make(store, url, full, backup_id, told)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            with suppress(AgentMemError):
                await asyncio.to_thread(notice.end)

    def new_id(self) -> str:
        return catalog.new_id(self._clock.wall_ms(), self._rng.token(3))

    async def _renew(self, notice: Notice) -> None:
        while True:
            await asyncio.sleep(NOTICE_S)
            with suppress(AgentMemError):
                await asyncio.to_thread(notice.renew, self._clock.wall_ms())

    async def _make(
        self, store: ObjectStore, url: str, full: bool, backup_id: str, told: Told
    ) -> Manifest:
        view = self._view()
        told.phase = "asking the nodes"
        parent = await asyncio.to_thread(_newest, store, view.cluster_id)
        await self._probe(url, f"{catalog.RUNNING_PREFIX}create-{backup_id}.json")
        nodes: set[str] = set()
        try:
            told.phase = "cutting"
            leaders, shard_map, at_ms, took_ms = await self._cut(backup_id, told, nodes)
            told.phase = "uploading"
            uploads = [
                asyncio.create_task(
                    self._upload(leader, backup_id, shard, url, parent, full, told),
                    name=f"backup-{shard}",
                )
                for shard, leader in leaders.items()
            ]
            try:
                shards = await asyncio.gather(*uploads)
            finally:
                for upload in uploads:
                    upload.cancel()
                await asyncio.gather(*uploads, return_exceptions=True)
        finally:
            await self._drop(backup_id, nodes)
        told.phase = "finishing"
        view = self._view()
        manifest = Manifest(
            id=backup_id,
            cluster_id=view.cluster_id,
            cluster_name=self._cluster_name,
            version=self._version,
            at_ms=at_ms,
            took_ms=took_ms,
            model=Model(name=view.model.name, dim=view.model.dim, model_hash=view.model.model_hash),
            map=shard_map.to_wire(),
            shards=sorted(shards, key=lambda shard: shard.id),
            parent=parent,
        )
        await asyncio.to_thread(store.put, manifest_name(backup_id), encode(manifest))
        log.info(
            "backup %s: %d memories, %d bytes, %d of them uploaded; writes waited %d ms",
            backup_id,
            manifest.content.memories,
            manifest.size_bytes,
            manifest.uploaded_bytes,
            took_ms,
        )
        return manifest

    # -- steps ----------------------------------------------------------------------------

    async def _probe(self, url: str, name: str) -> None:
        """Every leader must see what this node wrote: a directory that is not shared looks like
        one until a restore misses half of it."""
        leaders = set((await self._leaders(self._routing.current_map())).values())

        async def probe(node: str) -> None:
            try:
                seen = await self._ask(node, "backup.probe", {"url": url, "name": name}, _PROBE_S)
            except (AgentMemError, OSError) as error:
                raise _of_node(node, error) from error
            if not seen:
                raise BackupUnreachable(
                    f"Node {node} does not see in {url} what node {self._node_id} wrote there.",
                    hint="Each node uploads its own shards: use a directory that all nodes share "
                    "(mounted at the same path), or a bucket.",
                )

        await asyncio.gather(*(probe(node) for node in sorted(leaders)))

    async def _cut(
        self, backup_id: str, told: Told, nodes: set[str]
    ) -> tuple[dict[str, str], ShardMap, int, int]:
        """(leader of each shard, the map, the moment, milliseconds that writes waited).

        `nodes` learns who may hold something."""
        for attempt in range(_CUT_ATTEMPTS_MAX):
            shard_map = self._routing.current_map()
            leaders = await self._leaders(shard_map)
            nodes.update(leaders.values())
            try:
                at_ms, took_ms = await self._cut_once(backup_id, shard_map, leaders, told)
                return leaders, shard_map, at_ms, took_ms
            except (Conflict, DeadlineExceeded, Unavailable) as error:
                log.info("backup %s: the cut is tried again: %s", backup_id, error)
                await self._drop(backup_id, nodes)
                if attempt + 1 == _CUT_ATTEMPTS_MAX:
                    raise
                await asyncio.sleep(_CUT_PAUSE_S * (0.5 + self._rng.random()))
        raise AssertionError("the last attempt raises")

    async def _cut_once(
        self, backup_id: str, shard_map: ShardMap, leaders: dict[str, str], told: Told
    ) -> tuple[int, int]:
        by_node: dict[str, list[str]] = {}
        for shard, leader in leaders.items():
            by_node.setdefault(leader, []).append(shard)
        lease_s = self._hold_ms_max / 1000
        began_s = self._clock.monotonic()
        answers = await asyncio.gather(
            *(
                self._ask(
                    node,
                    "backup.cut",
                    {
                        "backup": backup_id,
                        "shards": [[shard, shard_map.shards[shard].epoch] for shard in shards],
                        "lease_ms": self._hold_ms_max,
                    },
                    lease_s + 1.0,
                )
                for node, shards in by_node.items()
            ),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        # Now every shard stands still. This is the moment.
        at_ms = self._clock.wall_ms()
        took_ms = int((self._clock.monotonic() - began_s) * 1000)
        confirmed = await asyncio.gather(
            *(
                self._ask(node, "backup.release", {"backup": backup_id, "shards": shards}, _CALL_S)
                for node, shards in by_node.items()
            ),
            return_exceptions=True,
        )
        for answer in confirmed:
            if isinstance(answer, BaseException):
                raise answer
        for sizes in answers:
            assert isinstance(sizes, dict)
            for shard, (_, size_bytes) in sizes.items():
                told.total[shard] = size_bytes
        return at_ms, took_ms

    async def _upload(
        self,
        leader: str,
        backup_id: str,
        shard: str,
        url: str,
        parent: str | None,
        full: bool,
        told: Told,
    ) -> ShardBackup:
        heard_s = self._clock.monotonic()
        while True:
            body = {
                "backup": backup_id,
                "shard": shard,
                "url": url,
                "parent": parent,
                "full": full,
                "wait_ms": 1_000,
            }
            try:
                answer = await self._ask(leader, "backup.upload", body, 1.0 + _POLL_S)
            except AgentMemError as error:
                # A connection may come back, and the node's thread has gone on meanwhile; what
                # the upload itself ended with is final.
                is_lost = type(error) in (Unavailable, DeadlineExceeded)
                if not is_lost or self._clock.monotonic() - heard_s > _SILENCE_S_MAX:
                    raise _of_node(leader, error) from error
                await asyncio.sleep(_CUT_PAUSE_S)
                continue
            heard_s = self._clock.monotonic()
            told.done[shard], told.total[shard], told.moved[shard], _, packed = answer
            if packed is not None:
                return _shard_decoder.decode(packed)

    async def _drop(self, backup_id: str, nodes: set[str]) -> None:
        async def drop(node: str) -> None:
            # Who cannot be told forgets by itself: leases end, and nobody asks any more.
            with suppress(AgentMemError):
                await self._ask(node, "backup.drop", {"backup": backup_id}, _POLL_S)

        await asyncio.gather(*(drop(node) for node in nodes))

    async def _leaders(self, shard_map: ShardMap) -> dict[str, str]:
        """The leader of each shard, once there is one. Raises NoQuorum."""
        until_s = self._clock.monotonic() + _LEADERS_S_MAX
        while True:
            leaders = {shard: self._routing.leader_of(shard) for shard in shard_map.shards}
            known = {
                shard: leader
                for shard, leader in leaders.items()
                if leader is not None and self._routing.is_connected(leader)
            }
            if len(known) == len(leaders):
                return known
            if self._clock.monotonic() > until_s:
                lost = ", ".join(sorted(leaders.keys() - known.keys()))
                raise NoQuorum(
                    f"No leader of shard {lost} can be reached: a backup needs all shards.",
                    hint="`agentmem cluster status` shows which nodes are up.",
                )
            await asyncio.sleep(_CUT_PAUSE_S / 4)

    async def _ask(self, node: str, method: str, body: dict[str, Any], timeout_s: float) -> Any:
        if node != self._node_id:
            deadline = self._clock.monotonic() + timeout_s
            return await self._routing.call(node, method, body, deadline)
        body["left_ms"] = int(timeout_s * 1000)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._own_calls[method](node, body)
        except TimeoutError:
            raise DeadlineExceeded(f"{method} did not end in {timeout_s:.0f} s.") from None


def _newest(store: ObjectStore, cluster_id: str) -> str | None:
    """The newest backup of this cluster: most chunks will be there because of it."""
    for item in reversed(catalog.listed(store)):
        if item.manifest is not None and item.manifest.cluster_id == cluster_id:
            return item.id
    return None


def _of_node(node: str, error: AgentMemError | OSError) -> AgentMemError:
    if not isinstance(error, AgentMemError):
        return BackupUnreachable(f"Node {node}: {error}")
    if error.message.startswith("Node "):
        return error
    made = type(error).__new__(type(error))
    AgentMemError.__init__(made, f"Node {node}: {error.message}", hint=error.hint, **error.details)
    return made
