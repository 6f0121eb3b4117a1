"""The meta group moves: it gets three voters, then five, and never depends on one that is gone.

The same mechanism as a shard's: its epoch is sealed by an entry of its own log, and the next
begins from that state. It is small, so a new voter is simply sent it; and it decides by itself, so
the seal *is* the founding: the voters to come stand in the state that it seals.

Whoever has that state goes on giving it to the others until the next epoch has begun, which says
that a majority of its voters has it. Only then is the cluster told of it, and the old voters leave.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from agentmem_cluster.epochs.commands import Begin, EpochState, Seal, encode
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.errors import AgentMemError, NotLeader
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import LEVEL_OF_CHANGES, MetaStateMachine, change_voters
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.placement import meta_voters
from agentmem_cluster.raft.api import GROUP_META, GroupSpec
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.runtime import Clock, Disk
from agentmem_node.service.admission import META_FOLDER
from agentmem_node.service.routing import Routing
from agentmem_node.service.view import MetaGroup, View

log = logging.getLogger("agentmem.voters")

_CALL_S: Final = 2.0
# A voter must be wrong, and the better ones right, for this long before the group moves.
_PATIENCE_S: Final = 3.0


class Voters:
    """This node's part in the meta group, whichever epoch it is at."""

    def __init__(
        self,
        node_id: str,
        disk: Disk,
        record: LocalRecord,
        host: Host,
        link: Link | None,
        routing: Routing,
        clock: Clock,
        founders: tuple[str, ...],
        on_change: Any,
    ) -> None:
        self._node_id = node_id
        self._disk = disk
        self._record = record
        self._host = host
        self._link = link
        self._routing = routing
        self._clock = clock
        self._founders = founders
        self._on_change = on_change
        self._better_since_s: float | None = None
        self._better: tuple[str, ...] = ()
        self.lost: frozenset[str] = frozenset()  # nodes that stayed away too long
        self.group: AsyncGroup | None = None
        self.machine: MetaStateMachine | None = None
        self._epochs: EpochMachine | None = None
        # How a voter's view of the cluster is taken over, and asked for; set by the membership.
        self.learn_view: Callable[[Any], Any] = lambda wire: None
        self.view_wire: Callable[[], Any] = lambda: None
        if link is not None:
            link.register("meta.join", self._on_join)

    # -- taking part ---------------------------------------------------------------------------

    def found(self) -> None:
        """Take a founder's place, with nothing. Raises OSError."""
        with self._record.kept(self._disk):
            if self._record.is_admitted:
                self._record.hold(GROUP_META, Held(1, META_FOLDER))
            else:
                self._record.found(GROUP_META, Held(1, META_FOLDER))
        self.open()

    def open(self) -> None:
        """Take part in the epoch that the record names. Raises MetaCorrupt, LogBehind."""
        held = self._record.held[GROUP_META]
        self._serve(held, MetaStateMachine(self._disk, held.folder))

    def _serve(self, held: Held, machine: MetaStateMachine) -> None:
        state = machine.state
        began = state.epoch.epoch == held.epoch
        members = (state.voters if began else state.next_voters) or self._founders
        spec = GroupSpec(
            GROUP_META,
            held.epoch,
            members,
            preferred=members[0],
            base_index=held.base_index,
            base_term=held.base_term,
        )
        self.machine = machine
        machine.on_change.append(self._on_change)
        self._epochs = EpochMachine(machine, held.epoch, on_change=self._on_change)
        self.group = self._host.add_group(spec, self._epochs)

    @property
    def meta_group(self) -> MetaGroup:
        """Who decides, as far as is known here: an epoch that has not begun decides nothing, and
        the old voters must not leave for it."""
        assert self.group is not None and self.machine is not None and self._epochs is not None
        spec = self.group.spec
        if self._epochs.has_begun:
            return MetaGroup(spec.epoch, spec.members)
        return MetaGroup(spec.epoch - 1, self.machine.state.voters or self._founders)

    @property
    def decides(self) -> bool:
        """Whether this node's epoch of the group is the one that decides, as far as is applied."""
        if self.group is None or self.machine is None:
            return False
        return self.machine.state.epoch == EpochState(self.group.spec.epoch, False)

    # -- moving --------------------------------------------------------------------------------

    async def step(self, view: View | None) -> None:
        """What is due now; to be called often. Raises OSError when the record cannot be written."""
        if self.group is None or self.machine is None or self._epochs is None:
            return
        elsewhere = view.meta if view is not None else None
        if elsewhere is not None and elsewhere.epoch > self.group.spec.epoch:
            self._leave(elsewhere.epoch - 1)
            return
        if self._epochs.is_sealed:
            await self._pass_on()
        elif not self._epochs.has_begun:
            if self.group.is_leader:
                await self._propose(encode(Begin(self.group.spec.epoch)))
            await self._offer_again()
        elif self.group.is_leader and view is not None:
            await self._improve(view)

    async def _improve(self, view: View) -> None:
        """As the leader: name better voters, and seal, when there are any for a while."""
        assert self.group is not None and self.machine is not None
        if self.machine.state.next_voters:
            await self._propose(encode(Seal(self.group.spec.epoch)))
            return
        better = await self._better_voters(view)
        now_s = self._clock.monotonic()
        if better != self._better or not better:
            self._better, self._better_since_s = better, now_s
            return
        assert self._better_since_s is not None
        if now_s - self._better_since_s < _PATIENCE_S:
            return
        self._better = ()
        log.warning("the meta group moves to %s", ", ".join(better))
        await self._propose(change_voters(self.group.spec.epoch, better))

    async def _better_voters(self, view: View) -> tuple[str, ...]:
        """Who should vote instead of the present voters; nobody when these are right."""
        assert self.group is not None
        present = self.group.spec.members
        if any(info.level < LEVEL_OF_CHANGES for info in view.nodes.values()):
            return ()
        if not set(present) <= set(view.nodes):
            return ()  # it was founded a moment ago, and its nodes say only now where they are
        able = {
            name: NodeState(
                name,
                zone=info.zone,
                is_draining=name in view.states,
                is_up=self._routing.is_connected(name),
                is_lost=name in self.lost,
            )
            for name, info in view.nodes.items()
            if view.states.get(name) != "removed"
        }
        wanted = meta_voters(able, present)
        everybody = all(self._routing.is_connected(name) for name in wanted)
        if set(wanted) != set(present):
            return wanted if everybody else ()
        for name in present:
            if name != self._node_id and await self._has_lost_it(name):
                return present if everybody else ()
        return ()

    async def _has_lost_it(self, voter: str) -> bool:
        """Whether a voter is up and says that it does not take part: its disk was lost."""
        if self._link is None or not self._routing.is_connected(voter):
            return False
        try:
            answer = await self._link.call(voter, "meta.hello", {}, timeout=_CALL_S)
        except AgentMemError:
            return False
        return bool(answer["is_founded"]) and not answer["holds_meta"]

    async def _pass_on(self) -> None:
        """The epoch is over: go on in the next, and give its state to those who begin there."""
        assert self.machine is not None and self.group is not None
        seal = self.machine.applied_index
        epoch, members = self.group.spec.epoch + 1, self.machine.state.next_voters
        term, image = self.group.term_at(seal), self.machine.image()
        if self._node_id in members:
            self._begin(epoch, seal, term, image)
        await self._offer(epoch, members, seal, term, image)

    async def _offer_again(self) -> None:
        """While the epoch has not begun, other voters may lack its state, and nobody else have it:
        whoever had it too may have gone down."""
        if self.group is None or self.machine is None or self._epochs is None:
            return
        if self._epochs.has_begun:
            return
        spec, index = self.group.spec, self.machine.applied_index
        term, image = self.group.term_at(index), self.machine.image()
        await self._offer(spec.epoch, spec.members, index, term, image)

    async def _offer(
        self, epoch: int, members: tuple[str, ...], index: int, term: int, image: bytes
    ) -> None:
        body = {"epoch": epoch, "index": index, "term": term, "image": image}

        async def offer(member: str) -> None:
            if self._link is None or not self._routing.is_connected(member):
                return
            try:
                view = await self._link.call(member, "meta.join", body, timeout=_CALL_S)
            except AgentMemError as error:
                log.info("%s does not take its vote yet: %s", member, error)
                return
            if view is not None:
                await self.learn_view(view)

        await asyncio.gather(*(offer(member) for member in members if member != self._node_id))

    async def _on_join(self, _peer: str, body: dict[str, Any]) -> Any:
        """`meta.join`: who has the state that an epoch begins with gives it to this node.

        Returns this node's view, once that epoch has begun.
        """
        if self.group is not None and self.group.spec.epoch >= body["epoch"]:
            return self.view_wire() if self.decides else None
        if not self._record.may_take_part(GROUP_META, body["epoch"]):
            raise NotLeader(f"Node {self._node_id} cannot vote in epoch {body['epoch']}.")
        self._begin(body["epoch"], body["index"], body["term"], body["image"])
        self._on_change()
        return None

    def _begin(self, epoch: int, index: int, term: int, image: bytes) -> None:
        folder = f"{META_FOLDER}-e{epoch}"
        machine = MetaStateMachine.install(self._disk, folder, image)
        held = Held(epoch, folder, index, term)
        with self._record.kept(self._disk):
            self._record.hold(GROUP_META, held)
        self._stop()
        self._serve(held, machine)
        self._host.wake()
        log.info("votes in epoch %d of the meta group", epoch)

    def _leave(self, epoch: int) -> None:
        with self._record.kept(self._disk):
            self._record.close(GROUP_META, epoch)
        self._stop()
        log.info("votes no more: the meta group is at epoch %d elsewhere", epoch + 1)

    def _stop(self) -> None:
        if self.group is not None:
            epoch = self.group.spec.epoch
            self._host.remove_group(GROUP_META)
            self._host.drop_log(GROUP_META, epoch)
        self.group = self.machine = self._epochs = None

    async def _propose(self, command: bytes) -> None:
        assert self.group is not None
        try:
            await self.group.propose(command, deadline=self._clock.monotonic() + _CALL_S)
        except AgentMemError as error:
            log.info("the meta group does not move yet: %s", error)
