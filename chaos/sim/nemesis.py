"""The faults: each kind comes at its own rate, does its harm, and is undone after a while."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from agentmem_chaos.sim.moves import Moves
from agentmem_chaos.sim.net import Pair, SimNet
from agentmem_chaos.sim.node import SimNode
from agentmem_chaos.sim.places import Places
from agentmem_chaos.sim.plan import Fault, WorldPlan
from agentmem_chaos.sim.schedule import Schedule, stream
from agentmem_chaos.sim.story import Story

# How long a fault lasts, in virtual seconds.
LASTS_S: dict[Fault, tuple[float, float]] = {
    Fault.KILL: (0.05, 4.0),
    Fault.KILL_MANY: (0.05, 3.0),
    Fault.POWER_LOSS: (0.2, 5.0),
    Fault.POWER_LOSS_ALL: (0.2, 3.0),
    Fault.PARTITION: (0.2, 6.0),
    Fault.PARTITION_ONE_WAY: (0.2, 6.0),
    Fault.PAUSE: (0.02, 4.0),
    Fault.SLOW_DISK: (0.5, 5.0),
    Fault.FULL_DISK: (0.3, 6.0),
    Fault.CLOCK_RATE: (1.0, 10.0),
    # About as long as an election takes: the old leader is still one when the new one begins, and
    # what it wrote meets what the new one has written.
    Fault.CUT_LEADER: (0.6, 2.5),
}


class Nemesis:
    def __init__(
        self,
        plan: WorldPlan,
        nodes: Mapping[str, SimNode],
        net: SimNet,
        schedule: Schedule,
        story: Story,
        places: Places,
        keys_of: Callable[[str], set[str]],
    ) -> None:
        self._plan = plan
        self._nodes = list(nodes.values())
        self._net = net
        self._schedule = schedule
        self._story = story
        self._active = True
        self.faults = 0
        self._moves = Moves(self._nodes, places, keys_of)
        self._acts: dict[Fault, Callable[[random.Random, float], str | None]] = {
            Fault.KILL: self._kill,
            Fault.KILL_MANY: self._kill_many,
            Fault.POWER_LOSS: self._power_loss,
            Fault.POWER_LOSS_ALL: self._power_loss_all,
            Fault.PARTITION: self._partition,
            Fault.PARTITION_ONE_WAY: self._partition_one_way,
            Fault.BREAK_SESSION: self._break_session,
            Fault.PAUSE: self._pause,
            Fault.SLOW_DISK: self._slow_disk,
            Fault.FULL_DISK: self._full_disk,
            Fault.FSYNC_ERROR: self._fsync_error,
            Fault.CLOCK_RATE: self._clock_rate,
            Fault.WALL_JUMP: self._wall_jump,
            Fault.TRANSFER: self._transfer,
            Fault.CUT_LEADER: self._cut_leader,
            Fault.MOVE: self._moves.move,
            Fault.RESEED: self._moves.reseed,
            Fault.LOSE_DISK: self._moves.lose_disk,
            Fault.SPLIT: self._moves.split,
            Fault.REWIND: self._moves.rewind,
        }

    def start(self) -> None:
        for fault, every_s in self._plan.fault_every_s.items():
            self._next(fault, every_s, stream(self._plan.seed, f"nemesis/{fault.name}"))

    def _next(self, fault: Fault, every_s: float, chance: random.Random) -> None:
        self._schedule.after(
            chance.expovariate(1 / every_s), lambda: self._strike(fault, every_s, chance)
        )

    def _strike(self, fault: Fault, every_s: float, chance: random.Random) -> None:
        if not self._active:
            return
        lasts_s = chance.uniform(*LASTS_S.get(fault, (0.0, 0.0)))
        what = self._acts[fault](chance, lasts_s)
        if what is not None:
            self.faults += 1
            self._story.tell(self._schedule.now_s, "", f"FAULT {what}")
        self._next(fault, every_s, chance)

    def heal(self) -> None:
        """The second phase: nothing is broken any more and nothing more breaks."""
        self._active = False
        self._story.tell(self._schedule.now_s, "", "everything is healed; now it must converge")
        self._net.cuts.clear()
        for node in self._nodes:
            node.disk.full = node.disk.fail_next_sync = False
            node.slowness = 1.0
            node.clock.set_rate(1.0)
            if node.paused:
                node.resume()
            node.boot_later(0.0)
        self._net.heal()

    def _undo_after(self, lasts_s: float, undo: Callable[[], None]) -> None:
        self._schedule.after(lasts_s, lambda: undo() if self._active else None)

    # -- processes and machines --

    def _victim(self, chance: random.Random) -> SimNode | None:
        alive = [node for node in self._nodes if node.alive]
        return chance.choice(alive) if alive else None

    def _kill(self, chance: random.Random, lasts_s: float) -> str | None:
        node = self._victim(chance)
        if node is None:
            return None
        node.kill("killed")
        node.boot_later(lasts_s)
        return f"{node.name} is killed, for {lasts_s:.2f} s"

    def _kill_many(self, chance: random.Random, lasts_s: float) -> str:
        count = chance.choice([len(self._nodes) // 2 + 1, len(self._nodes)])
        victims = chance.sample(self._nodes, count)
        for node in victims:
            node.kill("killed")
            node.boot_later(lasts_s * chance.random())
        return f"{_names(victims)} are killed at once"

    def _power_loss(self, chance: random.Random, lasts_s: float) -> str | None:
        node = chance.choice(self._nodes)
        node.lose_power("lost power")
        node.boot_later(lasts_s)
        return f"{node.name} loses power, for {lasts_s:.2f} s"

    def _power_loss_all(self, chance: random.Random, lasts_s: float) -> str:
        for node in self._nodes:
            node.lose_power("lost power")
            node.boot_later(lasts_s * chance.random())
        return "every machine loses power"

    def _pause(self, chance: random.Random, lasts_s: float) -> str | None:
        node = self._victim(chance)
        if node is None or node.paused:
            return None
        node.pause()
        boot = node.boot_number

        def resume() -> None:
            if node.paused and node.boot_number == boot:
                node.tell("goes on")
                node.resume()

        self._undo_after(lasts_s, resume)
        return f"{node.name} is paused, for {lasts_s:.2f} s"

    def _transfer(self, chance: random.Random, lasts_s: float) -> str | None:
        node = self._victim(chance)
        if node is None or node.paused:
            return None
        group = chance.choice(sorted(node.groups)) if node.groups else None
        if group is None:
            return None
        node.transfer(group)
        return f"{node.name} is asked to hand over {group}"

    # -- network --

    def _partition(self, chance: random.Random, lasts_s: float) -> str | None:
        return self._split(chance, lasts_s, both_ways=True)

    def _partition_one_way(self, chance: random.Random, lasts_s: float) -> str | None:
        return self._split(chance, lasts_s, both_ways=False)

    def _split(self, chance: random.Random, lasts_s: float, *, both_ways: bool) -> str | None:
        if len(self._nodes) < 2:
            return None
        names = [node.name for node in self._nodes]
        inside = sorted(chance.sample(names, chance.randint(1, len(names) - 1)))
        return self._isolate(inside, lasts_s, both_ways=both_ways)

    def _cut_leader(self, chance: random.Random, lasts_s: float) -> str | None:
        """A leader with as many of its followers as are no majority: the others go on."""
        leading = [
            (node, spec)
            for node in self._nodes
            for spec in node.groups.values()
            if len(spec.members) > 2 and node.core is not None and node.core.is_leader(spec.id)
        ]
        if not leading:
            return None
        leader, spec = chance.choice(leading)
        followers = [name for name in spec.members if name != leader.name]
        # With the leader, they are at most as many as are no majority.
        most = (len(spec.members) - 1) // 2 - 1
        company = chance.sample(followers, chance.choice([most, most, chance.randint(0, most)]))
        return self._isolate(sorted([leader.name, *company]), lasts_s, both_ways=True)

    def _isolate(self, inside: list[str], lasts_s: float, *, both_ways: bool) -> str:
        outside = [node.name for node in self._nodes if node.name not in inside]
        pairs: set[Pair] = {(a, b) for a in inside for b in outside}
        if both_ways:
            pairs |= {(b, a) for a, b in pairs}
        self._net.cut(pairs)
        self._undo_after(lasts_s, self._mend)
        arrow = "<-/->" if both_ways else "-/->"
        return f"{','.join(inside)} {arrow} {','.join(outside)}, for {lasts_s:.2f} s"

    def _mend(self) -> None:
        self._story.tell(self._schedule.now_s, "", "the network is whole")
        self._net.heal()

    def _break_session(self, chance: random.Random, lasts_s: float) -> str | None:
        if len(self._nodes) < 2:
            return None
        a, b = chance.sample(self._nodes, 2)
        self._net.break_session(a.name, b.name)
        return f"the connection of {a.name} and {b.name} breaks"

    # -- disks and clocks --

    def _slow_disk(self, chance: random.Random, lasts_s: float) -> str:
        node = chance.choice(self._nodes)
        node.slowness = chance.choice([5.0, 30.0, 100.0])

        def undo() -> None:
            node.slowness = 1.0

        self._undo_after(lasts_s, undo)
        return f"{node.name}'s disk is {node.slowness:.0f} times slower, for {lasts_s:.2f} s"

    def _full_disk(self, chance: random.Random, lasts_s: float) -> str:
        node = chance.choice(self._nodes)
        node.disk.full = True

        def undo() -> None:
            node.disk.full = False
            node.tell("has room on its disk again")

        self._undo_after(lasts_s, undo)
        return f"{node.name}'s disk is full, for {lasts_s:.2f} s"

    def _fsync_error(self, chance: random.Random, lasts_s: float) -> str | None:
        node = self._victim(chance)
        if node is None:
            return None
        node.disk.fail_next_sync = True
        return f"{node.name}'s next sync fails"

    def _clock_rate(self, chance: random.Random, lasts_s: float) -> str:
        node = chance.choice(self._nodes)
        node.clock.set_rate(chance.choice([0.5, 0.8, 1.25, 2.0]))
        self._undo_after(lasts_s, lambda: node.clock.set_rate(1.0))
        return f"{node.name}'s clock runs at {node.clock.rate} for {lasts_s:.2f} s"

    def _wall_jump(self, chance: random.Random, lasts_s: float) -> str:
        node = chance.choice(self._nodes)
        jump_ms = chance.choice([-86_400_000, -1_000, 1_000, 86_400_000])
        node.clock.jump_wall(jump_ms)
        return f"{node.name}'s wall clock jumps by {jump_ms} ms"


def _names(nodes: list[SimNode]) -> str:
    return ", ".join(sorted(node.name for node in nodes))
