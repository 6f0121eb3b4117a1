"""How a node finds its place: the meta group, the shard map, and the shards that live here.

The meta group (three voters, five when there are as many nodes) replicates which nodes exist,
which shard lives where and which embedding model the cluster uses. Voters read it from their own
replica; every other node asks a voter for it. The map that was seen last is kept on disk: a node
that restarts serves its shards before the meta group has a leader again, which is safe because
the members of a group never change within an epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from agentmem_cluster.errors import AgentMemError, NotLeader, Unavailable
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import (
    ClusterSettings,
    MetaStateMachine,
    NodeInfo,
    init_cluster,
    put_node,
)
from agentmem_cluster.raft.api import GROUP_META, GroupSpec
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.runtime import Clock, Disk, Rng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config import Config, ConfigError
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.routing import Routing

log = logging.getLogger("agentmem.membership")

_VIEW_FILE = "cluster-view.msgpack"
_POLL_S = 0.1
_SETTLED_POLL_S = 1.0
_CALL_S = 2.0
# A leader moves home only when nothing happened for a while: after a crash the returning node
# first catches up and the cluster first calms down.
_TRANSFER_QUIET_S = 3.0
_TRANSFER_LAG_MAX = 64
# What reading a view can raise that was damaged, or comes from another version.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, AgentMemError)


class WrongCluster(Exception):
    """The other nodes were founded anew without this node's data: it must not join them."""


class WrongModel(Exception):
    """This node embeds with another model than the cluster: it must not start."""


@dataclass(frozen=True, slots=True)
class View:
    """What a node knows of its cluster: plain data, as it travels and as it is kept on disk."""

    cluster_id: str
    model: ModelIdentity
    nodes: dict[str, NodeInfo]
    map: ShardMap

    def to_wire(self) -> dict[str, Any]:
        return {
            "cluster_id": self.cluster_id,
            "model": [self.model.name, self.model.dim, self.model.model_hash],
            "nodes": {name: info.to_wire() for name, info in self.nodes.items()},
            "map": self.map.to_wire(),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> View:
        return cls(
            wire["cluster_id"],
            ModelIdentity(*wire["model"]),
            {name: NodeInfo.from_wire(info) for name, info in wire["nodes"].items()},
            ShardMap.from_wire(wire["map"]),
        )


def meta_voters(nodes: list[str]) -> tuple[str, ...]:
    """The first three nodes by name, or five: a majority must be cheap to reach."""
    return tuple(sorted(nodes)[: 5 if len(nodes) >= 5 else 3])


class Membership:
    def __init__(
        self,
        config: Config,
        *,
        disk: Disk,
        host: Host,
        link: Link | None,
        clock: Clock,
        rng: Rng,
        routing: Routing,
        own: NodeInfo,
        on_view: Callable[[View], Awaitable[None]],
        may_found: asyncio.Event,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._disk = disk
        self._host = host
        self._link = link
        self._clock = clock
        self._rng = rng
        self._routing = routing
        self._own = own
        self._on_view = on_view
        # A cluster records its model for ever: nobody founds one before the model was loaded.
        self._may_found = may_found
        self._on_fatal = on_fatal
        self._node_id = config.node.id
        self._all = sorted(config.cluster.nodes) or [self._node_id]
        self._voters = meta_voters(self._all)
        self._meta: AsyncGroup | None = None
        self._machine: MetaStateMachine | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._view_ready = asyncio.Event()
        self._last_trouble_s = clock.monotonic()
        self.view: View | None = None

    # -- life ---------------------------------------------------------------------------

    async def start(self, model: ModelIdentity) -> None:
        """Join the meta group or find it, then keep the view current in the background."""
        kept = self._load_view()
        if kept is not None:
            await self._adopt(kept, model)
        if self._node_id in self._voters:
            self._machine = MetaStateMachine(self._disk, "meta")
            self._machine.on_change.append(self._changed.set)
            spec = GroupSpec(GROUP_META, 1, self._voters, preferred=self._voters[0])
            self._meta = self._host.add_group(spec, self._machine)
        if self._link is not None:
            self._link.register("meta.view", self._on_view_asked)
            self._link.register("meta.put_node", self._on_put_node)
            self._link.register("shard.leaders", self._on_leaders_asked)
        self._tasks = [
            asyncio.create_task(self._follow(model), name="membership"),
            asyncio.create_task(self._balance(), name="leader-balance"),
        ]

    async def wait_view(self, timeout_s: float) -> View:
        """The first view. Raises TimeoutError, and what `start`'s background work died of.

        What it dies of later is told to `on_fatal`: a node that no longer follows its cluster
        must not go on as if it did.
        """
        waiter = asyncio.create_task(self._view_ready.wait())
        try:
            await asyncio.wait(
                {waiter, *self._tasks}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            waiter.cancel()
        self.check()
        if self.view is None:
            raise TimeoutError
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self.view

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_fatal(error)

    def check(self) -> None:
        """Raises what ended the background work, if anything did."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- following ----------------------------------------------------------------------

    async def _follow(self, model: ModelIdentity) -> None:
        registered = False
        while True:
            self._changed.clear()
            view = await self._fetch(model)
            if view is not None:
                if self._is_news(view):
                    await self._adopt(view, model)
                    self._save_view(view)
                if not registered or view.nodes.get(self._node_id) != self._own:
                    registered = await self._register()
            settled = view is not None and registered
            await self._learn_leaders()
            try:
                await asyncio.wait_for(
                    self._changed.wait(), _SETTLED_POLL_S if settled else _POLL_S
                )
            except TimeoutError:
                pass

    def _is_news(self, view: View) -> bool:
        """Not what is known already, nor what a voter says that has slept or just started."""
        known = self.view
        if known is None:
            return True
        return view.map.version >= known.map.version and view.to_wire() != known.to_wire()

    async def _fetch(self, model: ModelIdentity) -> View | None:
        """The newest view that can be had now."""
        if self._machine is None:
            return await self._ask_voters()
        state = self._machine.state
        if state.settings is None or state.map is None:
            if self._meta is not None and self._meta.is_leader and self._may_found.is_set():
                await self._found(model)
            return None
        settings = state.settings
        return View(
            settings.cluster_id,
            ModelIdentity(settings.model_name, settings.model_dim, settings.model_hash),
            dict(state.nodes),
            state.map,
        )

    async def _found(self, model: ModelIdentity) -> None:
        """As the leader of a meta group that is empty: decide what the cluster is. First wins."""
        assert self._meta is not None
        cluster = self._config.cluster
        settings = ClusterSettings(
            cluster_id=self._rng.token(8).hex(),
            name=cluster.name,
            model_name=model.name,
            model_dim=model.dim,
            model_hash=model.model_hash,
            created_ms=self._clock.wall_ms(),
        )
        first_map = ShardMap.initial(
            self._all, shards=cluster.shards, replication=self._config.replicas
        )
        try:
            await self._meta.propose(
                init_cluster(settings, first_map), deadline=self._clock.monotonic() + _CALL_S
            )
        except AgentMemError as error:
            log.info("founding the cluster: %s; trying again", error)

    async def _ask_voters(self) -> View | None:
        for voter in self._voters:
            if not self._routing.is_connected(voter):
                continue
            assert self._link is not None
            try:
                wire = await self._link.call(voter, "meta.view", {}, timeout=_CALL_S)
                if wire is not None:
                    return View.from_wire(wire)
            except _UNREADABLE as error:
                log.debug("no view of the cluster from %s: %r", voter, error)
        return None

    async def _learn_leaders(self) -> None:
        """Who leads the shards that have no replica here: one call to a member tells several."""
        if self.view is None or self._link is None:
            return
        unknown = {s: i for s, i in self.view.map.shards.items() if s not in self._routing.local}
        while unknown:
            member = next(
                (
                    member
                    for info in unknown.values()
                    for member in info.members
                    if self._routing.is_connected(member)
                ),
                None,
            )
            if member is None:
                return
            unknown = {s: i for s, i in unknown.items() if member not in i.members}
            try:
                leaders = await self._link.call(member, "shard.leaders", {}, timeout=_CALL_S)
                self._routing.learn_leaders(leaders)
            except AgentMemError:
                continue  # the next round asks again

    async def _on_leaders_asked(self, _peer: str, _body: dict[str, Any]) -> dict[str, str | None]:
        return {shard: local.group.leader for shard, local in self._routing.local.items()}

    async def _on_view_asked(self, _peer: str, _body: dict[str, Any]) -> dict[str, Any] | None:
        return None if self.view is None else self.view.to_wire()

    async def _adopt(self, view: View, model: ModelIdentity) -> None:
        if view.model != model:
            raise WrongModel(
                f"This cluster embeds with {view.model}; this node has {model}. Vectors of two "
                "models cannot be compared. Configure the cluster's model under [embedding], or "
                "start a new cluster in an empty data directory."
            )
        if self.view is not None and view.cluster_id != self.view.cluster_id:
            # Groups of two clusters have the same names and epochs: their logs must never meet.
            raise WrongCluster(
                f"This data directory belongs to cluster {self.view.cluster_id}; the nodes in "
                f"[cluster.nodes] are cluster {view.cluster_id}, founded anew. Give this node an "
                "empty data directory, or start all nodes on their old data."
            )
        self.view = view
        self._routing.map = view.map
        await self._on_view(view)
        self._view_ready.set()

    # -- registering --------------------------------------------------------------------

    async def _register(self) -> bool:
        deadline = self._clock.monotonic() + _CALL_S
        try:
            if self._meta is not None and self._meta.is_leader:
                await self._meta.propose(put_node(self._node_id, self._own), deadline=deadline)
                return True
            leader = self._meta.leader if self._meta is not None else None
            for voter in [leader] if leader else self._voters:
                if voter is None or not self._routing.is_connected(voter) or self._link is None:
                    continue
                try:
                    await self._link.call(
                        voter, "meta.put_node", {"info": self._own.to_wire()}, timeout=_CALL_S
                    )
                    return True
                except NotLeader:
                    continue
        except AgentMemError as error:
            log.debug("registering with the meta group: %s; trying again", error)
        return False

    async def _on_put_node(self, peer: str, body: dict[str, Any]) -> None:
        """A peer says where it is reached; only itself, because `peer` is authenticated."""
        if self._meta is None:
            raise NotLeader("This node does not vote in the meta group.")
        await self._meta.propose(
            put_node(peer, NodeInfo.from_wire(body["info"])),
            deadline=self._clock.monotonic() + _CALL_S,
        )

    # -- what was seen last ---------------------------------------------------------------

    def _load_view(self) -> View | None:
        if not self._disk.exists(_VIEW_FILE):
            return None
        file = self._disk.open(_VIEW_FILE)
        try:
            wire = msgpack.unpackb(file.pread(file.size(), 0))
            view, voters = View.from_wire(wire), tuple(wire["voters"])
        # A damaged copy is no loss: the meta group has the original.
        except (*_UNREADABLE, OSError) as error:
            log.warning("cannot read the kept shard map (%s); asking the cluster", error)
            return None
        finally:
            file.close()
        if voters != self._voters:
            raise ConfigError(
                f"With these [cluster.nodes], {', '.join(self._voters)} would vote on what the "
                f"cluster is, but {', '.join(voters)} founded it: two majorities could decide two "
                "things. Give [cluster.nodes] as it was then; only addresses may change."
            )
        return view

    def _save_view(self, view: View) -> None:
        try:
            file = self._disk.open(_VIEW_FILE + ".new", create=True)
            try:
                data: bytes = msgpack.packb(view.to_wire() | {"voters": self._voters})
                file.truncate(0)
                file.pwrite(data, 0)
                file.datasync()
            finally:
                file.close()
            self._disk.rename(_VIEW_FILE + ".new", _VIEW_FILE)
            self._disk.sync_dir("")
        except OSError as error:
            log.warning("cannot keep a copy of the shard map: %s", error)

    # -- leaders ------------------------------------------------------------------------

    async def _balance(self) -> None:
        """Give the leadership of a shard to the node that the map prefers, one at a time."""
        while True:
            await asyncio.sleep(_SETTLED_POLL_S / 2)
            view = self.view
            if view is None:
                continue
            now = self._clock.monotonic()
            if not all(self._routing.is_connected(node) for node in self._all):
                self._last_trouble_s = now
            if now - self._last_trouble_s < _TRANSFER_QUIET_S:
                continue
            for shard_id, local in list(self._routing.local.items()):
                home = local.info.preferred_leader
                if not local.group.is_leader or home == self._node_id:
                    continue
                status = local.group.status()
                if status.last_index - status.match_index.get(home, 0) > _TRANSFER_LAG_MAX:
                    continue
                try:
                    await local.group.transfer(home, deadline=now + _CALL_S)
                    log.info("gave the leadership of %s to %s", shard_id, home)
                except AgentMemError as error:
                    log.info("%s keeps the leadership of %s: %s", self._node_id, shard_id, error)
                break

    def meta_status(self) -> dict[str, Any] | None:
        """The meta group as this node sees it; None when it does not vote."""
        if self._meta is None:
            return None
        status = self._meta.status()
        return {
            "members": list(status.members),
            "leader": status.leader,
            "term": status.term,
            "applied_index": status.applied_index,
        }

    def require_view(self) -> View:
        """The view. Raises Unavailable while there is none."""
        if self.view is None:
            raise Unavailable(
                "This node has not learnt the shard map yet.",
                hint="It is still starting, or cannot reach a majority of the cluster.",
            )
        return self.view
