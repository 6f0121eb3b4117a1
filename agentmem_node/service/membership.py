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
from collections.abc import Callable
from typing import Any

from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.errors import AgentMemError, BadRequest, NotLeader, Unavailable
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import (
    ClusterSettings,
    MetaState,
    NodeInfo,
    Outcome,
    init_cluster,
    put_node,
)
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.raft.checkpoints import is_full
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.runtime import Clock, Disk, Rng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config import Config, ConfigError
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.admission import admit
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.routing import Routing
from agentmem_node.service.view import UNREADABLE, View, load_view, save_view
from agentmem_node.service.voters import Voters

log = logging.getLogger("agentmem.membership")

_POLL_S = 0.1
_SETTLED_POLL_S = 1.0
_CALL_S = 2.0


class WrongCluster(Exception):
    """The other nodes were founded anew without this node's data: it must not join them."""


class WrongModel(Exception):
    """This node embeds with another model than the cluster: it must not start."""


def meta_voters(nodes: list[str]) -> tuple[str, ...]:
    """The first three nodes by name, or five: a majority must be cheap to reach."""
    return tuple(sorted(nodes)[: 5 if len(nodes) >= 5 else 3])


class Membership:
    def __init__(
        self,
        config: Config,
        *,
        disk: Disk,
        record: LocalRecord,
        host: Host,
        link: Link | None,
        clock: Clock,
        rng: Rng,
        routing: Routing,
        replicas: Replicas,
        own: NodeInfo,
        may_found: asyncio.Event,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._disk = disk
        self._record = record
        self._host = host
        self._link = link
        self._clock = clock
        self._rng = rng
        self._routing = routing
        self._replicas = replicas
        self._own = own
        # A cluster records its model for ever: nobody founds one before the model was loaded.
        self._may_found = may_found
        self._on_fatal = on_fatal
        self._node_id = config.node.id
        self._configured = sorted(config.cluster.nodes) or [self._node_id]
        self._founders = meta_voters(self._configured)
        self._model: ModelIdentity | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._voters = Voters(
            self._node_id,
            disk,
            record,
            host,
            link,
            routing,
            clock,
            self._founders,
            self._state_changed,
        )
        self._heard: set[str] = set()  # who has said again who it is
        self._level_required = 1
        # What keeps older versions out once they would misread what is decided; set by the node.
        self.require_level: Callable[[int], None] = lambda level: None
        self._view_ready = asyncio.Event()
        self._adopting = asyncio.Lock()
        self.on_view: list[Callable[[View], None]] = []
        self.view: View | None = None
        replicas.learn_view = self._voters.learn_view = self.learn
        replicas.view_wire = self._voters.view_wire = self.view_wire
        routing.on_stale_map = self._changed.set

    # -- life ---------------------------------------------------------------------------

    async def start(self, model: ModelIdentity) -> None:
        """Join the meta group or find it, then keep the view current in the background."""
        self._model = model
        kept = load_view(self._disk)
        if kept is not None:
            view, founders = kept
            if founders != self._founders and not self._config.cluster.join:
                raise ConfigError(
                    f"With these [cluster.nodes], {', '.join(self._founders)} would have founded "
                    f"the cluster, but {', '.join(founders)} did: two majorities could decide two "
                    "things. Give [cluster.nodes] as it was then; only addresses may change."
                )
            if self._record.is_admitted:
                await self._adopt(view)
        if GROUP_META in self._record.held:
            self._voters.open()
            self._state_changed()
        if self._link is not None:
            self._link.register("meta.hello", self._on_hello)
            self._link.register("meta.view", self._on_view_asked)
            self._link.register("meta.learn", self._on_learn)
            self._link.register("meta.put_node", self._on_put_node)
            self._link.register("meta.introduce", self._on_introduce)
            self._link.register("meta.propose", self._on_propose)
            self._link.register("shard.leaders", self._on_leaders_asked)
        self._tasks = [asyncio.create_task(self._follow(), name="membership")]

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

    async def _follow(self) -> None:
        registered = False
        while True:
            self._changed.clear()
            try:
                if self._meta is None:
                    await self._join_meta()
                view = await self._fetch()
                if view is not None and view.is_newer_than(self.view):
                    await self._adopt(view)
                await self._voters.step(self.view)
            except OSError as error:
                if not is_full(error):
                    raise
                log.warning("cannot write what this node takes part in: %s; trying again", error)
                view = None
            if view is not None:
                if not registered or not self._is_known(view):
                    registered = await self._register(view)
                await self._ask_for_introductions(view)
            settled = view is not None and registered and self._record.is_admitted
            await self._learn_leaders()
            try:
                async with asyncio.timeout(_SETTLED_POLL_S if settled else _POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _join_meta(self) -> None:
        """Found the meta group with others that have nothing, or take the founder's place in it."""
        if self._node_id not in self._founders or self._config.cluster.join:
            return
        view = self.view
        if view is None:
            if self._record.closed.get(GROUP_META, 0) or not await self._is_untouched():
                return
            # A majority of the founders holds nothing, so there is nothing that could be lost. In
            # anything but this group it takes part when the cluster knows its disk, as all do.
        else:
            has_moved = view.meta is not None and view.meta.epoch > 1
            if has_moved or not self._record.may_take_part(GROUP_META, 1):
                return
        self._voters.found()
        self._host.wake()

    async def _is_untouched(self) -> bool:
        """Whether a majority of the founders, this node included, says that it holds nothing."""
        untouched = 1
        for voter in self._founders:
            if voter == self._node_id or not self._routing.is_connected(voter):
                continue
            assert self._link is not None
            try:
                answer = await self._link.call(voter, "meta.hello", {}, timeout=_CALL_S)
                if answer["is_founded"]:
                    return False
                untouched += answer.get("is_blank", not answer["holds_meta"])
            except UNREADABLE as error:
                log.debug("no greeting from %s: %r", voter, error)
        return 2 * untouched > len(self._founders)

    async def _on_hello(self, _peer: str, _body: dict[str, Any]) -> dict[str, Any]:
        return {
            "holds_meta": self._meta is not None,
            "is_blank": self._is_blank(),
            "is_founded": self.view is not None,
        }

    def _is_blank(self) -> bool:
        """A founder that has taken its place, but has neither voted nor got an entry, still holds
        nothing: else who came first would keep all others from founding with it."""
        if self._meta is None:
            return True
        status = self._meta.status()
        return status.term == 0 and status.last_index == 0

    @property
    def _meta(self) -> AsyncGroup | None:
        return self._voters.group

    async def _fetch(self) -> View | None:
        """The newest view that can be had now."""
        if self._meta is None:
            return await self._ask_voters()
        view = self._own_view()
        if view is None and self._meta.is_leader and self._may_found.is_set():
            assert self._model is not None
            await self._found(self._model)
        if self._meta is not None and self._meta.leader is None:
            # The group may have moved on without this node, which nobody would tell it then.
            theirs = await self._ask_voters()
            if theirs is not None and theirs.is_newer_than(view):
                return theirs
        return view

    def _own_view(self) -> View | None:
        """What this node's own replica of the meta group says."""
        machine = self._voters.machine
        if machine is None:
            return None
        return View.of(machine.state, machine.applied_index, self._voters.meta_group)

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
            self._configured, shards=cluster.shards, replication=self._config.replicas
        )
        try:
            await self._meta.propose(
                init_cluster(settings, first_map), deadline=self._clock.monotonic() + _CALL_S
            )
        except AgentMemError as error:
            log.info("founding the cluster: %s; trying again", error)

    async def _ask_voters(self) -> View | None:
        """Any voter's view will do, but for a node that has yet to be admitted: what it may take
        part in is decided by that view, so it must have all that its old self can have known."""
        body = {"fresh": not self._record.is_admitted}
        older: View | None = None
        for voter in self._whom_to_ask():
            if voter == self._node_id or not self._routing.is_connected(voter):
                continue
            assert self._link is not None
            try:
                wire = await self._link.call(voter, "meta.view", body, timeout=_CALL_S)
                view = None if wire is None else View.from_wire(wire)
            except UNREADABLE as error:
                log.debug("no view of the cluster from %s: %r", voter, error)
                continue
            if view is not None and not view.is_from_older:
                return view
            older = older or view
        return older

    def _whom_to_ask(self) -> list[str]:
        """Whom to ask what the cluster is: its voters, as far as known, and then anybody."""
        known = self.view.meta.members if self.view is not None and self.view.meta else ()
        return list(dict.fromkeys([*known, *self._founders, *self._configured]))

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

    async def _on_view_asked(self, _peer: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """`meta.view`: what this node knows; when it is to be `fresh`, only the leader answers."""
        if not body.get("fresh"):
            return self.view_wire()
        await self.read_state()
        view = self._own_view()
        return None if view is None else view.to_wire()

    def view_wire(self) -> dict[str, Any] | None:
        return None if self.view is None else self.view.to_wire()

    async def _on_learn(self, _peer: str, body: dict[str, Any]) -> None:
        """`meta.learn`: a peer says what changed, so that nobody waits for the next poll."""
        await self.learn(body["view"])

    async def learn(self, wire: Any) -> None:
        """Take over a peer's view, if it is newer. One that cannot be read is left alone."""
        try:
            view = View.from_wire(wire)
        except UNREADABLE as error:
            log.debug("a peer's view of the cluster cannot be read: %r", error)
            return
        if view.is_newer_than(self.view) and self.view is not None:
            await self._adopt(view)

    async def tell_all(self) -> None:
        """Have every connected node learn this node's view now."""
        view = self._own_view()
        if view is not None and view.is_newer_than(self.view):
            await self._adopt(view)
        if self._link is None or self.view is None:
            return
        body = {"view": self.view.to_wire()}
        peers = self._link.peers_up()
        await asyncio.gather(
            *(self._link.call(peer, "meta.learn", body, timeout=_CALL_S) for peer in peers),
            return_exceptions=True,  # who does not hear it now asks within a second
        )

    async def _adopt(self, view: View) -> None:
        async with self._adopting:
            if not view.is_newer_than(self.view):
                return
            self._check_identity(view)
            self._require(view.needs_level)
            if admit(self._record, view, self._node_id, self._disk):
                self._changed.set()
            self.view = view
            if self._link is not None:
                self._link.set_peers(self._peers_of(view))
            # Shards before the map that routes to them.
            self._replicas.learn(view.map, view.changes, view.revision)
            self._routing.map = view.map
            self._routing.roots = view.roots or len(view.map.shards)
            self._view_ready.set()
            save_view(self._disk, view, self._founders)
        for callback in self.on_view:
            callback(view)

    def _state_changed(self) -> None:
        """The meta group's replica here has applied something."""
        machine = self._voters.machine
        if machine is not None:
            try:
                # At once: before anything that it decided can be seen elsewhere.
                self._require(machine.state.needs_level)
            except OSError as error:
                log.warning("cannot mark the data directory: %s; trying again", error)
        self._changed.set()

    def _require(self, level: int) -> None:
        if level > self._level_required:
            self.require_level(level)
            self._level_required = level

    def _check_identity(self, view: View) -> None:
        if view.model != self._model:
            raise WrongModel(
                f"This cluster embeds with {view.model}; this node has {self._model}. Vectors of "
                "two models cannot be compared. Configure the cluster's model under [embedding], "
                "or start a new cluster in an empty data directory."
            )
        if self.view is not None and view.cluster_id != self.view.cluster_id:
            # Groups of two clusters have the same names and epochs: their logs must never meet.
            raise WrongCluster(
                f"This data directory belongs to cluster {self.view.cluster_id}; the nodes in "
                f"[cluster.nodes] are cluster {view.cluster_id}, founded anew. Give this node an "
                "empty data directory, or start all nodes on their old data."
            )

    def _peers_of(self, view: View) -> dict[str, str]:
        """Where every node is reached: as configured here, or as it says itself."""
        peers = {name: info.peer for name, info in view.nodes.items() if info.peer}
        configured = {name: peer.peer for name, peer in self._config.cluster.nodes.items()}
        # What a node was told when it joined grows old; what an operator wrote is an order.
        peers = configured | peers if self._config.cluster.join else peers | configured
        return {name: peer for name, peer in peers.items() if view.states.get(name) != "removed"}

    # -- registering --------------------------------------------------------------------

    async def _register(self, view: View) -> bool:
        try:
            try:
                await self.propose(put_node(self._node_id, self._own))
            except BadRequest:  # an older version leads: it stores what it understands
                if not self._is_known(view, in_full=False):
                    body = {"info": self._own.to_wire()}
                    await self.ask_leader("meta.put_node", body, _CALL_S)
            return True
        except UNREADABLE as error:
            log.debug("registering with the meta group: %s; trying again", error)
            return False

    def _is_known(self, view: View, *, in_full: bool = True) -> bool:
        """Whether the cluster knows what this node says of itself."""
        known = view.nodes.get(self._node_id)
        # An older version tells only what it understands; saying it again would not help.
        if known is None or (in_full and not view.is_from_older):
            return known == self._own
        return (known.peer, known.http, known.version) == (
            self._own.peer,
            self._own.http,
            self._own.version,
        )

    async def _ask_for_introductions(self, view: View) -> None:
        """Have the other nodes say again who they are, when an older version kept this replica of
        the meta group meanwhile: it stored of what they said only what it understood."""
        machine = self._voters.machine
        if machine is None or not machine.is_from_older or self._link is None:
            return
        for name in sorted(view.nodes):
            if name in {self._node_id, *self._heard} or not self._routing.is_connected(name):
                continue
            try:
                await self._link.call(name, "meta.introduce", {}, timeout=_CALL_S)
                self._heard.add(name)
            except AgentMemError as error:  # one that still runs it registers when it is upgraded
                log.debug("%s does not introduce itself: %s", name, error)

    async def _on_introduce(self, _peer: str, _body: dict[str, Any]) -> None:
        """`meta.introduce`: register again, although the cluster at large knows this node."""
        await self.propose(put_node(self._node_id, self._own))

    async def propose(self, command: bytes) -> Outcome:
        """Have the meta group's leader replicate a command, wherever it is. Raises Unavailable."""
        if self._meta is not None and self._meta.is_leader:
            return await self.propose_here(command)
        return Outcome(*await self.ask_leader("meta.propose", {"command": command}, _CALL_S))

    async def propose_here(self, command: bytes) -> Outcome:
        """`propose` for who has just read the state as the leader: what follows from that is
        nothing for another leader to decide. Raises NotLeader on every other node."""
        if self._meta is None or not self._meta.is_leader:
            raise NotLeader("This node does not lead the meta group.")
        deadline = self._clock.monotonic() + _CALL_S
        applied = await self._meta.propose(command, deadline=deadline)
        return _outcome(applied.result)

    async def ask_leader(self, method: str, body: dict[str, Any], timeout_s: float) -> Any:
        """Call the meta group's leader, another node. Raises Unavailable, and what it raises."""
        leader = self._meta.leader if self._meta is not None else None
        for voter in [leader] if leader else self._whom_to_ask():
            if voter in (None, self._node_id) or not self._routing.is_connected(str(voter)):
                continue
            assert self._link is not None
            try:
                return await self._link.call(str(voter), method, body, timeout=timeout_s)
            except NotLeader:
                continue
        raise Unavailable(
            "The meta group has no leader that this node can reach.",
            hint="A majority of its voters must be up: see `agentmem cluster status`.",
        )

    async def read_state(self) -> MetaState:
        """The meta group's state, as its leader: nothing that was decided is missing.

        Raises NotLeader on every other node, NoQuorum, DeadlineExceeded.
        """
        machine = self._voters.machine
        if self._meta is None or machine is None or not self.leads:
            raise NotLeader("This node does not lead the meta group.")
        await self._meta.read_index(deadline=self._clock.monotonic() + _CALL_S)
        if machine is not self._voters.machine or not self._voters.decides:
            raise NotLeader("The meta group is moving to other voters.")
        return machine.state

    async def confirmed_view(self) -> View:
        """The cluster as it is decided now, as the meta group's leader. Raises as `read_state`, and
        Unavailable while the cluster is not founded."""
        await self.read_state()
        view = self._own_view()
        if view is None:
            raise Unavailable("This cluster is not founded yet.", hint="Try again in a moment.")
        return view

    async def _on_propose(self, _peer: str, body: dict[str, Any]) -> list[str]:
        """`meta.propose`: only the leader answers; it is asked by authenticated nodes only."""
        return list(await self.propose_here(body["command"]))

    async def _on_put_node(self, peer: str, body: dict[str, Any]) -> None:
        """A peer says where it is reached; only itself, because `peer` is authenticated."""
        if self._meta is None:
            raise NotLeader("This node does not vote in the meta group.")
        await self._meta.propose(
            put_node(peer, NodeInfo.from_wire(body["info"])),
            deadline=self._clock.monotonic() + _CALL_S,
        )

    # -- views --------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this node leads the meta group: it then conducts the changes of shards."""
        return self._meta is not None and self._meta.is_leader and self.view is not None

    @property
    def is_admitted(self) -> bool:
        """Whether the cluster knows this node's disk: before it takes part in no shard."""
        return self._record.is_admitted

    @property
    def lost(self) -> frozenset[str]:
        """Nodes that stayed away longer than `cluster.lost_after_ms`, as the meta leader counts."""
        return self._voters.lost

    @lost.setter
    def lost(self, nodes: frozenset[str]) -> None:
        self._voters.lost = nodes

    @property
    def meta_leader(self) -> str | None:
        """Who leads the meta group, as far as this node knows."""
        return None if self._meta is None else self._meta.leader

    async def ask(self, node: str, method: str, body: dict[str, Any]) -> Any:
        """One call of another node. Raises its error, Unavailable, DeadlineExceeded."""
        if self._link is None:
            raise Unavailable(f"Node {node} is unknown: this node runs alone.")
        return await self._link.call(node, method, body, timeout=_CALL_S)

    def is_connected(self, node: str) -> bool:
        return self._routing.is_connected(node)

    @property
    def peers(self) -> dict[str, str]:
        """Every node and the address of its link, this one's too. Raises Unavailable."""
        return self._peers_of(self.require_view())

    @property
    def nodes(self) -> list[str]:
        """Every node of the cluster, as far as is known."""
        return self._configured if self.view is None else sorted(self.view.map.nodes())

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


def _outcome(result: Any) -> Outcome:
    """A command that came after the group's seal was certainly not done."""
    if not isinstance(result, Outcome):
        raise NotLeader("The meta group is moving to other voters.")
    return result
