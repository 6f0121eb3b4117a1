"""A simulated machine whose replicas come and go, by the real epoch machinery."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agentmem_chaos.sim.copies import open_snapshot
from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.epochs import EpochJudge
from agentmem_chaos.sim.link import SimLink
from agentmem_chaos.sim.machine import Divisible, Effect, MachineStore, ReplicaStore
from agentmem_chaos.sim.membership import SimMembership
from agentmem_chaos.sim.meta_machine import MetaReplica, MetaStore
from agentmem_chaos.sim.node import HANDOFF_S, SimNode
from agentmem_chaos.sim.places import Place
from agentmem_chaos.sim.replicas import SimReplicas
from agentmem_chaos.sim.rewinds import KeptState
from agentmem_chaos.sim.schedule import SimRng, stream
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_cluster.epochs.commands import Begin, Seal, decode
from agentmem_cluster.epochs.record import Held
from agentmem_cluster.epochs.replicas import Served
from agentmem_cluster.errors import AgentMemError, WrongShard
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.meta import MetaStateMachine
from agentmem_cluster.raft.api import GROUP_META, Entry, GroupSpec
from agentmem_cluster.raft.core import NodeCore
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.service.admission import META_FOLDER, open_record


class MovingNode(SimNode):
    epochs: EpochJudge  # set by the world, which knows all machines
    first_map: ShardMap
    voters: tuple[str, ...]

    def prepare(self, epochs: EpochJudge, voters: tuple[str, ...], first_map: ShardMap) -> None:
        """Before the first boot."""
        self.epochs, self.voters, self.first_map = epochs, voters, first_map
        self.groups: dict[str, GroupSpec] = {}
        self.stores: dict[str, ReplicaStore] = {}  # by folder
        self.incarnation = ""
        self.lives = 0  # of its disk
        self.replicas: SimReplicas | None = None
        self.membership: SimMembership | None = None
        self._link: SimLink | None = None
        self._shard_of: dict[str, str] = {}
        self._served: dict[str, Served] = {}
        self._wholes: dict[str, str] = {}  # whose log a copy applies, by folder, if another's
        self._lost: set[tuple[str, int]] = set()
        self.lost_index: dict[str, int] = {}  # what the disks that it lost had of a group
        self._is_founder = self.name in voters

    # -- life and death --------------------------------------------------------------------------

    def _open_groups(self, core: NodeCore, journal: Journal) -> None:
        chance = stream(self.plan.seed, f"record/{self.name}/{self.boot_number}")
        record = open_record(self.disk, journal.groups(), SimRng(chance))
        if self._is_founder and GROUP_META not in record.held:
            # The founders have asked each other that nobody holds anything yet.
            record.found(GROUP_META, Held(1, META_FOLDER))
            record.save(self.disk)
        self._is_founder = False
        self.incarnation = record.incarnation
        in_use = {held.folder for held in record.held.values()}
        in_use |= {ready.folder for ready in record.ready.values()}
        for folder in [f for f in self.stores if f not in in_use]:
            self.drop_store(folder)  # copies that were not whole, and what nobody takes part with
        meta = None
        if GROUP_META in record.held:
            spec = GroupSpec(GROUP_META, 1, self.voters)
            meta = self._found_meta(spec)
            core.add_group(spec, self.machines[GROUP_META])
            self.groups[GROUP_META] = spec
        self._record = record
        link = SimLink(
            self.name, lambda peer, frames: self._net.send(self.name, peer, frames), self.later
        )
        self._link = link
        membership = SimMembership(
            self,
            core,
            self.disk,
            record,
            link,
            self.voters,
            self.first_map,
            None if meta is None else meta.inner,
        )
        self.replicas = SimReplicas(
            self, core, self.disk, record, link, membership.view_wire, membership.learn
        )
        membership.replicas = self.replicas
        self.membership = membership

    def _started(self) -> None:
        assert self.membership is not None and self.replicas is not None
        self.replicas.start()
        self.membership.start()

    def _found_meta(self, spec: GroupSpec) -> MetaReplica:
        def observe(entry: Entry, effect: Effect, digest: bytes | None) -> None:
            if self._judge.applied(self.name, META_FOLDER, GROUP_META, entry, effect, digest):
                self._auditor().committed(spec, entry.index, entry.term)
            for change in machine.inner.state.changes.values():
                self.epochs.begun(change)
                if change.base is not None:
                    self.epochs.founded(change)

        store = self.stores.setdefault(META_FOLDER, MetaStore())
        self._shard_of[META_FOLDER] = GROUP_META
        assert isinstance(store, MetaStore)
        machine = MetaReplica(self.disk, META_FOLDER, store, observe)
        self._judge.booted(self.name, META_FOLDER, machine.applied_index)
        self.machines[GROUP_META] = machine
        return machine

    def _die(self, why: str, *, silent: bool) -> bool:
        died = super()._die(why, silent=silent)
        if died:
            self._forget()
        return died

    def _forget(self) -> None:
        self._wholes.clear()
        self.groups.clear()
        self._served.clear()
        self.replicas = self.membership = self._link = None

    def lose_disk(self, why: str) -> None:
        """The machine comes back with an empty disk, and remembers nothing."""
        # A folder keeps its name when its shard's members stay: the record knows the epoch.
        self._lost |= {(group, held.epoch) for group, held in self._record.held.items()}
        for folder, group in self._shard_of.items():
            epoch = 1 if group == GROUP_META else int(folder.rpartition("-e")[2])
            self._lost.add((group, epoch))
            self.lost_index[group] = max(self.lost_index.get(group, 0), self.durable_index(group))
        self._die(why, silent=True)
        self.lives += 1
        full, boot = self.disk.full, self.disk.boot
        self.disk = SimDisk(stream(self.plan.seed, f"disk/{self.name}/{self.lives}"))
        self.disk.full, self.disk.boot = full, boot + 1
        self.disk.durable_version = self.lives << 32
        for folder in list(self.stores):
            self.drop_store(folder)
        self._forget()

    @property
    def meta(self) -> MetaStateMachine | None:
        machine = self.machines.get(GROUP_META)
        return machine.inner if isinstance(machine, MetaReplica) else None

    @property
    def may_be_amnesiac(self) -> bool:
        """It lost its disk and the cluster does not know yet."""
        return self.lives > 0 and (self.membership is None or not self.membership.is_registered)

    def is_whole(self, shard: str, epoch: int) -> bool:
        """Whether a replica of that epoch serves here and takes writes."""
        served = self._served.get(shard)
        return served is not None and served.info.epoch == epoch and served.machine.has_begun

    def folder_of(self, shard: str) -> str:
        """Of the replica that serves."""
        return self._served[shard].folder

    # -- states ----------------------------------------------------------------------------------

    def store_of(self, shard: str, folder: str) -> ReplicaStore:
        store = self.stores.get(folder)
        if store is None:
            self._shard_of[folder] = shard
            store = self.stores[folder] = self._make_store(
                GroupSpec(shard, int(folder.rpartition("-e")[2]), (self.name,))
            )
        return store

    def follows(self, folder: str, whole: str | None) -> None:
        """The copy in this folder is to be a part, and applies the log of `whole`; until None."""
        if whole is None:
            self._wholes.pop(folder, None)
        else:
            self._wholes[folder] = whole

    def kept(self, source: str) -> KeptState:
        return self.epochs.rewinds.kept[source]

    def rebased(self, folder: str, index: int) -> None:
        self._judge.booted(self.name, folder, index)

    def keep(self, shard: str, keys: Iterable[str]) -> KeptState:
        """What the replica here is now; `keys`: those whose values may be asked for again."""
        served = self._served[shard]
        machine: Any = served.machine.inner
        assert self.core is not None
        index, info = machine.applied_index, served.info
        snapshot = open_snapshot(self.stores[served.folder])
        try:
            chunks = tuple(snapshot.read(number) for number in range(snapshot.chunks))
            head = snapshot.head
        finally:
            snapshot.close()
        return KeptState(
            f"{shard}-at-{index}-{self._schedule.now_s:.6f}",
            shard,
            (info.slot_start, info.slot_end),
            index,
            self.core.term_at(shard, index),
            machine.digest(),
            head,
            chunks,
            {key: machine.read(key) for key in keys},
            self._judge.in_force(shard, index),
        )

    def open_state(self, shard: str, folder: str) -> Divisible:
        def observe(entry: Entry, effect: Effect, digest: bytes | None) -> None:
            log = self._wholes.get(folder, shard)
            spec = self.groups.get(log)
            if (
                self._judge.applied(self.name, folder, log, entry, effect, digest)
                and spec is not None
            ):
                self._auditor().committed(spec, entry.index, entry.term)
            control = decode(entry.command)
            if isinstance(control, Seal) and effect.ok:
                self.epochs.sealed(log, control.epoch, entry.index)
            elif isinstance(control, Begin) and effect.ok:
                self.epochs.began(log, control.epoch)

        store = self.store_of(shard, folder)
        machine: Divisible
        if isinstance(store, ShardStore):
            machine = self._parts.make_shard(store, observe)
        else:
            assert isinstance(store, MachineStore)
            machine = self._parts.make_machine(store, observe)
        self._judge.booted(self.name, folder, machine.applied_index)
        return machine

    def close_state(self, folder: str) -> None:
        self.stores[folder].close()

    def drop_store(self, folder: str) -> None:
        store = self.stores.pop(folder, None)
        if store is not None:
            store.remove()
            del self._shard_of[folder]

    def durable_index(self, group: str) -> int:
        found = [s.durable_index for f, s in self.stores.items() if self._shard_of[f] == group]
        return max(found, default=0)

    def may_have_lost(self, spec: GroupSpec) -> bool:
        return (spec.id, spec.epoch) in self._lost

    # -- groups ----------------------------------------------------------------------------------

    def served(self, served: Served) -> None:
        shard = served.info.id
        self._served[shard] = served
        self.groups[shard] = served.spec
        machine: Any = served.machine.inner
        self.machines[shard] = machine
        self.epochs.takes_part(self, served)
        self.tell(f"takes part in epoch {served.info.epoch} of {shard} with {served.info.members}")

    def gone(self, shard: str) -> None:
        self.tell(f"leaves {shard}")
        self._served.pop(shard, None)
        self.groups.pop(shard, None)
        self.machines.pop(shard, None)

    def map_of_shards(self) -> tuple[int, tuple[Place, ...]]:
        view = None if self.membership is None else self.membership.view
        if view is None:
            return 0, ()
        return view.map.version, tuple(
            Place(s.id, s.epoch, s.members, (s.slot_start, s.slot_end))
            for s in view.map.shards.values()
        )

    def shard_of(self, group: str, key: str) -> str:
        view = None if self.membership is None else self.membership.view
        if view is None:
            return group
        return view.map.shard_of_slot(self.places.slot(group, key)).id

    def acknowledged(self, spec: GroupSpec, index: int) -> None:
        self.epochs.acknowledged(spec.id, spec.epoch, index, self.name)

    def refusal(self, group: str) -> AgentMemError | None:
        served = self._served.get(group)
        if served is None or self.core is None:
            return WrongShard(f"{group} is not on {self.name}", hint="Refresh the shard map.")
        if self.core.is_leader(group) and not served.machine.accepts:
            return WrongShard(f"{group} is between two epochs", hint="Retry: it takes a moment.")
        return None

    def applied_index(self, group: str) -> int:
        served = self._served.get(group)
        if served is None:
            return self.machines[group].applied_index if group in self.machines else 0
        return served.machine.applied_index

    # -- the process -----------------------------------------------------------------------------

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        boot = self.boot_number
        self._schedule.after(delay_s, lambda: self.in_process(boot, action))

    def now_s(self) -> float:
        return self.clock.monotonic()

    def pick(self, names: list[str]) -> str:
        return self._chance.choice(names)

    def after_sync(self, job: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        boot = self.boot_number

        def run() -> None:
            if not self.alive or boot != self.boot_number:
                return
            failure: OSError | None = None
            try:
                if self._state_is_full():
                    raise OSError(28, "no room", "state")
                self.disk.before_sync("state")
                job()
            except OSError as error:
                failure = error
            self.later(HANDOFF_S, lambda: done(failure))

        self._schedule.after(self._sync_s(), run)

    # -- what the network calls ------------------------------------------------------------------

    def arrive(self, peer: str, frames: list[Any]) -> None:
        if not frames or not isinstance(frames[0][0], str):
            super().arrive(peer, frames)
            return

        def receive() -> None:
            assert self._link is not None
            for frame in frames:
                self._link.receive(peer, frame)

        self.in_process(self.boot_number, receive)

    def connected(self, peer: str, session: int) -> None:
        super().connected(peer, session)
        self.in_process(self.boot_number, lambda: self._peer(peer, is_up=True))

    def disconnected(self, peer: str) -> None:
        super().disconnected(peer)
        self.in_process(self.boot_number, lambda: self._peer(peer, is_up=False))

    def _peer(self, peer: str, *, is_up: bool) -> None:
        if self._link is not None:
            (self._link.connected if is_up else self._link.disconnected)(peer)
