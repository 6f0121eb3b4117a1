"""What a seed decides about a world before it starts: its size, its speed, its faults.

Swarm testing (Groce and others, 2012): each world draws which faults it has at all and how often,
because a world with every fault at the same rate never gets to the states that need one fault
often and another never.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from enum import Enum

from agentmem_chaos.sim.net import NetPlan
from agentmem_chaos.sim.schedule import stream
from agentmem_cluster.raft.api import GROUP_META, GroupSpec
from agentmem_cluster.shardmap import ShardMap

SECONDS_DEFAULT = 60.0
SHARD_SHARE = 0.35  # of the worlds have shards of the real engine
MOVES_SHARE = 0.35  # of the worlds have shards that move: ring 3, the epoch machinery
CORE_CLIENTS_SHARE = 0.4  # of the worlds are called through the client library's core
# The second phase: everything is healed and the cluster must converge. A minute's world gives a
# third of it, a short one still leaves time for elections, reconnection and catching up; and no
# world has longer than half a minute to meet and to have answered everything.
CALM_SHARE = 0.3
CALM_S_MIN = 14.0
CALM_S_MAX = 30.0
MOVES_S_MIN = 8.0  # a world with less time than that for moves has none
SYNC_S_MAX = 0.15  # of the slowest disk: a replica must be able to catch up in the second phase


class Engine(Enum):
    """What the groups replicate."""

    REGISTERS = "registers"
    SHARD = "shard"  # the real one, on files


class Fault(Enum):
    KILL = "kill one process"
    KILL_MANY = "kill a majority or all processes at once"
    POWER_LOSS = "power loss of one machine"
    POWER_LOSS_ALL = "power loss of all machines at once"
    PARTITION = "partition"
    PARTITION_ONE_WAY = "one-way partition"
    BREAK_SESSION = "break a connection"
    PAUSE = "pause a process"
    SLOW_DISK = "slow disk"
    FULL_DISK = "full disk"
    FSYNC_ERROR = "failing fsync"
    CLOCK_RATE = "clock at another rate"
    WALL_JUMP = "wall clock jump"
    TRANSFER = "leadership transfer"
    CUT_LEADER = "a leader and less than half of its group cut off"
    MOVE = "a shard is given to other nodes"
    RESEED = "a replica is copied anew"
    LOSE_DISK = "a disk is lost"
    SPLIT = "a shard is split in two"
    REWIND = "a shard is taken back to an earlier state"


# Virtual seconds between two faults of a kind, where a world has it: drawn log-uniformly.
FAULT_EVERY_S: dict[Fault, tuple[float, float]] = {
    Fault.KILL: (2.0, 20.0),
    Fault.KILL_MANY: (6.0, 40.0),
    Fault.POWER_LOSS: (2.0, 20.0),
    Fault.POWER_LOSS_ALL: (4.0, 40.0),
    Fault.PARTITION: (3.0, 30.0),
    Fault.PARTITION_ONE_WAY: (3.0, 30.0),
    Fault.BREAK_SESSION: (0.5, 10.0),
    Fault.PAUSE: (2.0, 20.0),
    Fault.SLOW_DISK: (4.0, 30.0),
    Fault.FULL_DISK: (5.0, 40.0),
    Fault.FSYNC_ERROR: (5.0, 40.0),
    Fault.CLOCK_RATE: (3.0, 30.0),
    Fault.WALL_JUMP: (5.0, 30.0),
    Fault.TRANSFER: (2.0, 20.0),
    Fault.CUT_LEADER: (2.0, 20.0),
}
# Of worlds whose shards move, in addition.
MOVES_EVERY_S: dict[Fault, tuple[float, float]] = {
    Fault.MOVE: (1.5, 8.0),
    Fault.RESEED: (4.0, 20.0),
    Fault.LOSE_DISK: (6.0, 30.0),
    Fault.SPLIT: (4.0, 20.0),
    Fault.REWIND: (3.0, 15.0),
}


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """Everything about a world that is not an event. A function of its arguments to `draw`."""

    seed: int
    seconds: float
    nodes: tuple[str, ...]
    groups: tuple[GroupSpec, ...]
    engine: Engine  # of all groups but the first, which is the meta group
    net: NetPlan
    fault_every_s: dict[Fault, float]
    sync_s: tuple[float, float]
    slowness: tuple[float, ...]  # of each node's disk: machines are rarely alike
    loop_s: tuple[float, float]
    boot_s: tuple[float, float]
    clients: int
    core_clients: bool  # the client library's core carries out their calls
    keys_per_group: int
    quiet_groups: bool  # all groups but the first are nearly idle
    think_s: tuple[float, float]
    padding_bytes_max: int
    segment_bytes: int
    state_needs_room: bool
    checkpoint_entries: int
    checkpoint_s: float
    tail_bytes: int
    append_bytes_max: int
    inflight_appends_max: int
    queue_commands_max: int
    # The meta group is the real one, and shards change epochs and members as it says.
    moves: bool = False

    @property
    def asked(self) -> tuple[GroupSpec, ...]:
        """The groups that clients ask, as they are at the beginning."""
        return self.groups[1:] if self.moves else self.groups

    def engine_of(self, group: str) -> Engine:
        return Engine.REGISTERS if group == GROUP_META else self.engine

    @property
    def calm_at_s(self) -> float:
        """When faults end and the second phase begins."""
        if self.moves:  # what was begun must come to its end, too
            return self.seconds - CALM_S_MAX
        return self.seconds - min(CALM_S_MAX, max(CALM_S_MIN, self.seconds * CALM_SHARE))

    @classmethod
    def draw(
        cls,
        seed: int,
        *,
        nodes: int | None = None,
        seconds: float | None = None,
        engine: Engine | None = None,
        moves: bool | None = None,
    ) -> WorldPlan:
        seconds = SECONDS_DEFAULT if seconds is None else seconds
        if seconds < CALM_S_MIN + 1.0:
            raise ValueError(f"a world needs at least {CALM_S_MIN + 1.0:.0f} virtual seconds")
        chance = stream(seed, "plan")
        drawn = chance.choice([3, 3, 5])
        names = tuple(f"n{i + 1}" for i in range(nodes or drawn))
        slow_net = chance.random() < 0.3
        sync_s = chance.choice([(0.0001, 0.001), (0.001, 0.01), (0.002, 0.06)])
        # A stream of its own: what was drawn before there were shards stays as it was.
        if engine is None:
            is_shard = stream(seed, "engine").random() < SHARD_SHARE
            engine = Engine.SHARD if is_shard else Engine.REGISTERS
        if moves is None:
            moves = stream(seed, "moves?").random() < MOVES_SHARE
        moves &= seconds >= CALM_S_MAX + MOVES_S_MIN and len(names) >= 3
        plan = cls(
            seed=seed,
            seconds=seconds,
            nodes=names,
            groups=_groups(chance, names, engine),
            engine=engine,
            net=NetPlan(
                delay_s=(0.0002, 0.03 if slow_net else 0.004),
                spike_chance=chance.choice([0.0, 0.005, 0.03]),
                spike_s=chance.choice([0.05, 0.3, 1.0]),
                break_after_s=(0.3, chance.choice([1.0, 4.0])),
                reconnect_s=(0.01, chance.choice([0.1, 0.5])),
            ),
            fault_every_s=_faults(chance),
            sync_s=sync_s,
            slowness=_slowness(chance, sync_s[1], len(names)),
            loop_s=chance.choice([(0.0, 0.0002), (0.0001, 0.002)]),
            boot_s=(0.02, chance.choice([0.2, 1.0])),
            clients=chance.randint(3, 7),
            core_clients=stream(seed, "clients").random() < CORE_CLIENTS_SHARE,
            keys_per_group=chance.randint(1, 5),
            quiet_groups=chance.random() < 0.3,
            think_s=chance.choice([(0.0, 0.2), (0.05, 0.3), (0.1, 0.6)]),
            padding_bytes_max=chance.choice([0, 0, 100, 10_000, 30_000]),
            segment_bytes=chance.choice([4 << 10, 16 << 10, 64 << 10, 1 << 20]),
            state_needs_room=chance.random() < 0.5,
            checkpoint_entries=chance.choice([20, 100, 1_000]),
            checkpoint_s=chance.choice([1.0, 10.0, 60.0]),
            tail_bytes=chance.choice([1, 1 << 20, 32 << 20]),
            append_bytes_max=chance.choice([2_000, 1 << 20]),
            inflight_appends_max=chance.choice([4, 256]),
            queue_commands_max=chance.choice([8, 10_000]),
        )
        return plan.moving() if moves else plan

    def moving(self) -> WorldPlan:
        """The same world, but with shards that move. Its own chance: all else stays as it was."""
        chance = stream(self.seed, "moves")
        names = self.nodes
        if len(names) == 3 and chance.random() < 0.7:
            names = (*names, "n4")
        shards = ShardMap.initial(names, chance.choice([1, 1, 2]), 3).shards
        slowness = self.slowness + (1.0,) * (len(names) - len(self.nodes))
        return replace(
            self,
            # A lost disk and a replica that no log can bring up to date are two failures at once,
            # which a shard of three does not outlive: here logs go back far enough.
            tail_bytes=max(self.tail_bytes, 1 << 20),
            moves=True,
            nodes=names,
            slowness=slowness,
            groups=(
                GroupSpec(GROUP_META, 1, names[:3]),
                *(GroupSpec(s.id, 1, s.members, s.preferred_leader) for s in shards.values()),
            ),
            fault_every_s=self.fault_every_s
            | {
                fault: math.exp(chance.uniform(math.log(low), math.log(high)))
                for fault, (low, high) in MOVES_EVERY_S.items()
                if fault is Fault.MOVE or chance.random() < 0.5
            },
        )


def _groups(chance: random.Random, nodes: tuple[str, ...], engine: Engine) -> tuple[GroupSpec, ...]:
    """The first group has every node; others three of them, as shards of a larger cluster do."""
    groups = [GroupSpec(GROUP_META, 1, nodes, preferred=chance.choice([None, *nodes]))]
    shards = chance.choice([0, 0, 1, 2])
    for number in range(max(shards, 1) if engine is Engine.SHARD else shards):
        groups.append(
            GroupSpec(f"s{number:02}", 1, tuple(sorted(chance.sample(nodes, min(3, len(nodes))))))
        )
    return tuple(groups)


def _slowness(chance: random.Random, sync_s: float, nodes: int) -> tuple[float, ...]:
    """At most one slow disk, and never so slow that nobody can be elected with it."""
    slowness = [1.0] * nodes
    if chance.random() < 0.5:
        slowest = max(1.0, SYNC_S_MAX / sync_s)
        slowness[chance.randrange(nodes)] = min(slowest, chance.choice([5.0, 20.0, 100.0]))
    return tuple(slowness)


def _faults(chance: random.Random) -> dict[Fault, float]:
    share = chance.choice([0.15, 0.4, 0.7])
    every = {}
    for fault, (low, high) in FAULT_EVERY_S.items():
        interval = math.exp(chance.uniform(math.log(low), math.log(high)))
        if chance.random() < share:
            every[fault] = interval
    return every
