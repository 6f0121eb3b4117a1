"""One simulated machine: the real core and journal, and a process that can die, stop or stall.

This is what `agentmem_cluster.raft.host` is on a real machine, over virtual time: a turn runs the
core, a flush takes as long as the disk takes, and what the core releases goes to the network.
"""

from __future__ import annotations

import errno
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem_chaos.sim.audit import Auditor
from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.invariants import Invariants
from agentmem_chaos.sim.judge import Judge
from agentmem_chaos.sim.machine import Command, Effect, MachineStore, Replica, ReplicaStore
from agentmem_chaos.sim.net import SimNet
from agentmem_chaos.sim.parts import Parts, settings
from agentmem_chaos.sim.places import Place, Places
from agentmem_chaos.sim.plan import Engine, WorldPlan
from agentmem_chaos.sim.schedule import Schedule, SimClock, SimRng, stream
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_chaos.sim.story import Story
from agentmem_cluster.errors import AgentMemError, WrongShard
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry, GroupSpec, Role
from agentmem_cluster.raft.core import CheckpointJob, NodeCore, Ready
from agentmem_cluster.raft.frames import BOOT_BYTES

HANDOFF_S = 0.0002  # from the sync thread back to the loop
RESTART_S = (0.2, 3.0)
SYNC_S_MAX = 3.0  # or a sync that began before the healing would outlast the world


class SimNode:
    def __init__(
        self,
        name: str,
        plan: WorldPlan,
        parts: Parts,
        schedule: Schedule,
        net: SimNet,
        judge: Judge,
        invariants: Invariants,
        story: Story,
        auditor: Callable[[], Auditor],
        folder: Path,
        places: Places,
    ) -> None:
        self.name = name
        self.places = places
        self.folder = folder
        self.plan = plan
        self.groups = {spec.id: spec for spec in plan.groups if name in spec.members}
        self.disk = SimDisk(stream(plan.seed, f"disk/{name}"))
        self.clock = SimClock(schedule)
        self.stores: dict[str, ReplicaStore] = {
            group: self._make_store(spec) for group, spec in self.groups.items()
        }
        self.core: NodeCore | None = None
        self.journal: Journal | None = None
        self.machines: dict[str, Replica] = {}
        self.paused = False
        self.own_slowness = plan.slowness[plan.nodes.index(name)]
        self.slowness = 1.0  # a fault's, on top of its own
        self.boot_number = 0
        self.fsync_failed = False  # since this boot: the process may stop itself
        self._parts = parts
        self._schedule = schedule
        self._net = net
        self._judge = judge
        self._invariants = invariants
        self._story = story
        self._auditor = auditor
        self._chance = stream(plan.seed, f"node/{name}")
        # What a client sees at once when the process dies: its requests here are broken.
        self.connections: dict[int, Callable[[], None]] = {}
        self._held: list[Callable[[], None]] = []
        self._turn_planned = False
        self._timer_s = math.inf
        self._flushing = False
        self._watched: dict[str, tuple[object, ...]] = {}
        self._shown: dict[str, tuple[bool, str | None, int]] = {}

    # -- life and death --

    @property
    def alive(self) -> bool:
        return self.core is not None

    def boot(self) -> None:
        if self.alive:
            return
        self.boot_number += 1
        try:
            journal = self._parts.open_journal(self.disk, self.plan)
            core = self._parts.make_core(
                self.name,
                journal,
                self.clock,
                SimRng(stream(self.plan.seed, f"core/{self.name}/{self.boot_number}")),
                settings(self.plan),
                session_of_boot=self._chance.randbytes(BOOT_BYTES),
            )
            self._open_groups(core, journal)
        except OSError as error:
            self.tell(f"cannot start: {error}")
            self.boot_later()
            return
        except Exception as error:
            trace = traceback.format_exc()
            self._judge.accuse("recovery", f"{self.name} cannot start: {error}\n{trace}")
            return
        self.core, self.journal = core, journal
        self._started()
        applied = {group: machine.applied_index for group, machine in self.machines.items()}
        self.tell(f"started (boot {self.boot_number}), applied {applied}")
        self._net.join(self.name)
        self.plan_turn()

    def _open_groups(self, core: NodeCore, journal: Journal) -> None:
        """Raises OSError: then it starts again later."""
        for spec in self.groups.values():
            self._found(core, spec)

    def _started(self) -> None:
        """The process runs, and may speak."""

    def durable_index(self, group: str) -> int:
        """The last entry of a group that the files here would keep through a power loss."""
        return self.stores[group].durable_index

    def may_have_lost(self, spec: GroupSpec) -> bool:
        """Whether the disk was lost with what it had of this epoch."""
        return False

    def _make_store(self, spec: GroupSpec) -> ReplicaStore:
        def slot_of(key: str) -> int:
            return self.places.slot(self.places.group_of(spec.id), key)

        if self.plan.engine_of(spec.id) is Engine.REGISTERS:
            return MachineStore(is_full=self._state_is_full, slot_of=slot_of)
        return ShardStore(
            self.folder / f"{spec.id}-{spec.epoch}",
            spec.id,
            stream(self.plan.seed, f"store/{self.name}/{spec.id}/{spec.epoch}"),
            self._state_is_full,
            slot_of,
        )

    def _state_is_full(self) -> bool:
        return self.plan.state_needs_room and self.disk.full

    def _found(self, core: NodeCore, spec: GroupSpec) -> None:
        def observe(entry: Entry, effect: Effect, digest: bytes | None) -> None:
            if self._judge.applied(self.name, spec.id, spec.id, entry, effect, digest):
                self._auditor().committed(spec, entry.index, entry.term)

        store = self.stores[spec.id]
        machine: Replica
        if isinstance(store, ShardStore):
            machine = self._parts.make_shard(store, observe)
        else:
            assert isinstance(store, MachineStore)
            machine = self._parts.make_machine(store, observe)
        self.machines[spec.id] = machine
        self._judge.booted(self.name, spec.id, machine.applied_index)
        core.add_group(spec, machine)

    def boot_later(self, delay_s: float | None = None) -> None:
        delay_s = self._chance.uniform(*RESTART_S) if delay_s is None else delay_s
        self._schedule.after(delay_s + self._chance.uniform(*self.plan.boot_s), self.boot)

    def kill(self, why: str) -> None:
        """SIGKILL: the page cache survives. A state machine may or may not trust it."""
        if self._die(why, silent=False):
            self.disk.kill()
            keeps_cached = self._chance.random() < 0.4
            for store in self.stores.values():
                store.kill(keeps_cached=keeps_cached)

    def lose_power(self, why: str) -> None:
        self._die(why, silent=True)
        self.disk.power_loss()
        for store in self.stores.values():
            store.power_loss()

    def _die(self, why: str, *, silent: bool) -> bool:
        if not self.alive:
            return False
        self.tell(why)
        self.core = self.journal = None
        self._timer_s = math.inf
        self.machines.clear()
        self.boot_number += 1
        self.paused = self._turn_planned = self._flushing = self.fsync_failed = False
        self._held.clear()
        self._shown.clear()
        self._watched.clear()
        self._net.leave(self.name, silent=silent)
        broken, self.connections = self.connections, {}
        if not silent:
            for broke in broken.values():
                broke()
        return True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        held, self._held = self._held, []
        for action in held:
            if self.alive:
                action()
        self._net.join(self.name)

    def close(self) -> None:
        """The world ends."""
        for store in self.stores.values():
            store.close()

    def map_of_shards(self) -> tuple[int, tuple[Place, ...]]:
        """Its version, and who has which shard, as far as is known here."""
        return 1, tuple(
            Place(spec.id, spec.epoch, spec.members, self.places.range_of(spec.id))
            for spec in self.plan.asked
        )

    def shard_of(self, group: str, key: str) -> str:
        """Which shard of a group has a key, as far as is known here."""
        return group

    def members_of(self, shard: str) -> tuple[str, ...]:
        return next((s.members for s in self.map_of_shards()[1] if s.id == shard), ())

    def acknowledged(self, spec: GroupSpec, index: int) -> None:
        """A command that was proposed here took effect."""

    def refusal(self, group: str) -> AgentMemError | None:
        """Why no command may be proposed here now, if that is so."""
        if group in self.groups:
            return None
        return WrongShard(f"{group} is not on {self.name}", hint="Refresh the shard map.")

    def applied_index(self, group: str) -> int:
        """Which entries a read here sees; those that came after a seal have changed nothing."""
        return self.machines[group].applied_index

    def encode(self, group: str, command: Command) -> bytes:
        """The command as this node decides it, now."""
        return self.machines[group].encode(command, self.clock.wall_ms())

    def tell(self, what: str) -> None:
        # A folder has another name in each run.
        what = what.replace(str(self.folder), self.name)
        self._story.tell(self._schedule.now_s, self.name, what)

    # -- the process --

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in this process: never after its death, and only once it is not paused."""
        boot = self.boot_number
        self._schedule.after(delay_s, lambda: self.in_process(boot, action))

    def in_process(self, boot: int, action: Callable[[], None]) -> None:
        """Now, or when the pause ends; never in a later life than `boot`."""
        if not self.alive or boot != self.boot_number:
            return
        if self.paused:
            self._held.append(action)
        else:
            action()

    def plan_turn(self) -> None:
        if self.alive and not self._turn_planned:
            self._turn_planned = True
            self._later(self._chance.uniform(*self.plan.loop_s), self._turn)

    def _turn(self) -> None:
        self._turn_planned = False
        ready = self.run(_tick)
        if ready is not None:
            self._flush(ready)
        self._drain()
        self._watch()
        self._set_timer()

    def _flush(self, ready: Ready) -> None:
        if ready.job is None:
            self._synced(ready, None)
            return
        if self._flushing:
            self._judge.accuse("one flush at a time", f"{self.name} began a second one")
        self._flushing = True
        sync_s = self._sync_s()
        if not self._parts.syncs_before_it_speaks:
            self.disk.syncs_at_once = False
            ready.job.run()
            self._schedule.after(sync_s, self.disk.settle)
            self._synced(ready, None)
            return
        # The sync is the kernel's: it ends on time even when the process is paused meanwhile.
        boot = self.boot_number
        self._schedule.after(sync_s, lambda: self._sync_ended(boot, ready))

    def _sync_s(self) -> float:
        sync_s = self._chance.uniform(*self.plan.sync_s) * self.own_slowness * self.slowness
        return min(sync_s, SYNC_S_MAX)

    def _sync_ended(self, boot: int, ready: Ready) -> None:
        if not self.alive or boot != self.boot_number or ready.job is None:
            return
        failure: OSError | None = None
        try:
            ready.job.run()
        except OSError as error:
            self.fsync_failed = True
            failure = error
        self._later(HANDOFF_S, lambda: self._synced(ready, failure))

    def _synced(self, ready: Ready, failure: OSError | None) -> None:
        self._flushing = False
        if failure is None:
            self.run(lambda core: core.synced(ready))
        else:
            self.run(lambda core: core.sync_failed(ready, failure))
        self._drain()
        self.plan_turn()

    def _drain(self) -> None:
        """Send what may leave, and start the checkpoints that are due."""
        taken = self.run(_take)
        if taken is None:
            return
        outbox, checkpoints = taken
        for peer, frames in outbox:
            self._auditor().speaks(self, peer, frames)
            self._net.send(self.name, peer, frames)
        for checkpoint in checkpoints:
            delay_s = self._sync_s() * self._chance.uniform(0.1, 3.0)
            boot = self.boot_number
            self._schedule.after(delay_s, lambda b=boot, c=checkpoint: self._checkpoint(b, c))  # type: ignore[misc]

    def _checkpoint(self, boot: int, checkpoint: CheckpointJob) -> None:
        if not self.alive or boot != self.boot_number:
            return
        failure: OSError | None = None
        try:
            if self._state_is_full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state")
            self.disk.before_sync("state")
            checkpoint.job.run()
        except OSError as error:
            self.fsync_failed |= error.errno != errno.ENOSPC
            failure = error
        self._later(HANDOFF_S, lambda: self._checkpointed(checkpoint, failure))

    def _checkpointed(self, checkpoint: CheckpointJob, failure: OSError | None) -> None:
        if failure is None:
            self.run(lambda core: core.checkpointed(checkpoint))
        else:
            self.run(lambda core: core.checkpoint_failed(checkpoint, failure))
        self.plan_turn()

    def _set_timer(self) -> None:
        """Wake when the core wants to be. A timer that rings too early just sets the next one."""
        if self.core is None:
            return
        # Never quite now: a core that asks for the same instant for ever would stop time.
        delay_s = max(self.clock.virtual_s_until(self.core.next_wakeup()), 1e-4)
        at_s = self._schedule.now_s + delay_s
        if self._timer_s <= at_s:
            return
        self._timer_s = at_s
        self._later(delay_s, lambda: self._ring(at_s))

    def _ring(self, at_s: float) -> None:
        if at_s == self._timer_s:
            self._timer_s = math.inf
            self.plan_turn()

    def run(self, step: Callable[[NodeCore], Any]) -> Any:
        """Run a step of the core; an exception that escapes it is a violation by itself."""
        if self.core is None:
            return None
        try:
            result = step(self.core)
        except Exception as error:
            trace = traceback.format_exc()
            self._judge.accuse("no exceptions", f"{self.name}: {error!r}\n{trace}")
            return None
        if self.core.fatal is not None:
            fatal = self.core.fatal
            if not self.fsync_failed:
                trace = "".join(traceback.format_exception(fatal))
                self._judge.accuse("no stop without cause", f"{self.name}: {fatal!r}\n{trace}")
            self.kill(f"stopped itself: {fatal!r}")
            self.boot_later()
            return None
        return result

    def _watch(self) -> None:
        """After every turn: the cheap invariants, and who leads."""
        if self.core is None or self.journal is None:
            return
        core = self.core
        for group, spec in list(self.groups.items()):
            log = self.journal.group(group, spec.epoch)
            # Half of all turns change nothing here, and asking for a status is not free.
            moving = (
                spec.epoch,
                log.first_index,
                log.last_index,
                log.durable_index,
                log.term,
                self.applied_index(group),
                core.is_leader(group),
                core.leader(group),
            )
            if self._watched.get(group) == moving:
                continue
            self._watched[group] = moving
            status = core.status(group)
            durable_index = self.durable_index(group)
            self._invariants.turned(self.name, self.boot_number, status, log, durable_index)
            shown = (status.role is Role.LEADER, status.leader, spec.epoch)
            if self._shown.get(group) == shown:
                continue
            self._shown[group] = shown
            if shown[0]:
                self._judge.leads(self.name, group, spec.epoch, status.term)
                self._invariants.elected(self.name, status, log)
                self.tell(f"is leader of {group} in term {status.term}")
            else:
                self.tell(f"follows {shown[1] or 'nobody'} in {group} in term {status.term}")

    # -- what the network calls --

    def arrive(self, peer: str, frames: list[Any]) -> None:
        def receive() -> None:
            self.run(lambda core: core.receive(peer, frames))
            self.plan_turn()

        self.in_process(self.boot_number, receive)

    def connected(self, peer: str, session: int) -> None:
        def up() -> None:
            self.run(lambda core: core.peer_up(peer, session))
            self.plan_turn()

        self.in_process(self.boot_number, up)

    def disconnected(self, peer: str) -> None:
        def down() -> None:
            self.run(lambda core: core.peer_down(peer))
            self.plan_turn()

        self.in_process(self.boot_number, down)

    def transfer(self, group: str) -> None:
        self.run(lambda core: core.transfer(group))
        self.plan_turn()


def _tick(core: NodeCore) -> Ready | None:
    return core.tick()


def _take(core: NodeCore) -> tuple[list[tuple[str, list[Any]]], list[CheckpointJob]]:
    return core.take_outbox(), core.take_checkpoints()
