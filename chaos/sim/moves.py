"""Moves as faults: shards are given to other nodes, copied anew, and lose the disk under them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agentmem_chaos.sim.membership import SimMembership
from agentmem_chaos.sim.moving_node import MovingNode
from agentmem_chaos.sim.node import SimNode
from agentmem_chaos.sim.places import Places
from agentmem_chaos.sim.plan import WorldPlan
from agentmem_cluster.epochs.change import Change
from agentmem_cluster.meta import MetaState
from agentmem_cluster.raft.api import GroupSpec
from agentmem_cluster.shardmap import ShardInfo

MEMBERS = 3
SHARDS_MAX = 5
KEEP_CHANCE = 0.4
AWAY_S = (0.2, 3.0)


class Moves:
    def __init__(
        self, nodes: Sequence[SimNode], places: Places, keys_of: Callable[[str], set[str]]
    ) -> None:
        """`keys_of`: those of a group that clients have asked for."""
        self._places = places
        self._keys_of = keys_of
        self._nodes = [node for node in nodes if isinstance(node, MovingNode)]

    def move(self, chance: random.Random, lasts_s: float) -> str | None:
        """Any members: other ones, some of the old, or the same."""
        names = [node.name for node in self._nodes]
        members = tuple(sorted(chance.sample(names, min(MEMBERS, len(names)))))
        return self._begin(chance, members)

    def reseed(self, chance: random.Random, lasts_s: float) -> str | None:
        return self._begin(chance, None)

    def split(self, chance: random.Random, lasts_s: float) -> str | None:
        """In the middle, unless all its keys have one and the same slot."""
        asked = self._asked(chance)
        if asked is None:
            return None
        membership, info, shards = asked
        least = 2 * self._places.bucket_slots(self._places.group_of(info.id))
        if shards >= SHARDS_MAX or info.slot_end - info.slot_start < least:
            return None
        change = membership.split(info.id)
        membership.begin(change, lambda _: None)
        return f"{info.id} is to be {' and '.join(target.id for target in change.targets)}"

    def rewind(self, chance: random.Random, lasts_s: float) -> str | None:
        """To a state that was kept before; or one is kept, to be gone back to later."""
        asked = self._asked(chance)
        if asked is None:
            return None
        membership, info, _ = asked
        serving = [n for n in self._nodes if n.alive and n.is_whole(info.id, info.epoch)]
        able = [node for node in serving if not node.paused]
        if not able:
            return None
        rewinds = able[0].epochs.rewinds
        kept = rewinds.fitting(info.id, (info.slot_start, info.slot_end))
        if not kept or chance.random() < KEEP_CHANCE:
            keys = self._keys_of(self._places.group_of(info.id))
            rewinds.keep(chance.choice(able).keep(info.id, sorted(keys)))
            return None
        state = chance.choice(kept)
        change = replace(membership.change(info.id, info.members), source=state.id)
        membership.begin(change, lambda _: None)
        return f"{info.id} is to be as at {state.index} again"

    def _begin(self, chance: random.Random, members: tuple[str, ...] | None) -> str | None:
        asked = self._asked(chance)
        if asked is None:
            return None
        membership, info, _ = asked
        fresh: tuple[str, ...] = ()
        if members is None:
            members = info.members
            fresh = (chance.choice(members),)
        membership.begin(membership.change(info.id, members, fresh), lambda _: None)
        return f"{info.id} is to be on {', '.join(members)}" + (f", {fresh} anew" if fresh else "")

    def _asked(self, chance: random.Random) -> tuple[SimMembership, ShardInfo, int] | None:
        """As by an operator's command: the node that leads the meta group, some shard that nothing
        is done with, and how many there are."""
        leaders = (n for n in self._nodes if n.membership is not None and n.membership.leads)
        leader = next(leaders, None)
        if leader is None or leader.paused or leader.membership is None:
            return None
        view = leader.membership.view
        assert view is not None
        info = view.map.shards[chance.choice(sorted(view.map.shards))]
        if info.id in view.changes:
            return None
        return leader.membership, info, len(view.map.shards)

    def lose_disk(self, chance: random.Random, lasts_s: float) -> str | None:
        """One disk, when nothing is without its majority for it, and no other is being replaced."""
        state = newest(self._nodes)
        if state is None or state.map is None or any(n.may_be_amnesiac for n in self._nodes):
            return None
        for info in state.map.shards.values():
            for name in info.members:
                node = next(n for n in self._nodes if n.name == name)
                if not node.is_whole(info.id, info.epoch):
                    return None
        voters = [n for n in self._nodes if n.name in n.voters]
        victims = [n for n in self._nodes if n not in voters or not any(v.lives for v in voters)]
        if not victims:
            return None
        node = chance.choice(victims)
        node.lose_disk("lost its disk")
        node.boot_later(chance.uniform(*AWAY_S))
        return f"{node.name} loses its disk"


def newest(nodes: Sequence[MovingNode]) -> MetaState | None:
    """What the meta group has decided, as far as anybody has applied it."""
    machines = [node.meta for node in nodes if node.meta is not None]
    best = max(machines, key=lambda machine: machine.applied_index, default=None)
    return None if best is None else best.state


def groups_of(plan: WorldPlan, nodes: Mapping[str, MovingNode]) -> tuple[GroupSpec, ...]:
    """The groups as they are now."""
    state = newest(list(nodes.values()))
    if state is None or state.map is None:
        return plan.groups
    shards = state.map.shards.values()
    return (plan.groups[0], *(GroupSpec(s.id, s.epoch, s.members) for s in shards))


def unfinished(nodes: Mapping[str, MovingNode]) -> str:
    """What of the moves is not at its end: "" when all is."""
    state = newest(list(nodes.values()))
    if state is None or state.map is None:
        return "nobody knows the map"
    if state.changes:
        return "; ".join(_shown(change) for change in state.changes.values())
    for info in state.map.shards.values():
        for name in info.members:
            if not nodes[name].is_whole(info.id, info.epoch):
                return f"{name} does not serve epoch {info.epoch} of {info.id}"
    return ""


def _shown(change: Change) -> str:
    to = change.targets[0].members
    return (
        f"epoch {change.from_epoch} of {change.shard} on {change.old_members} is not yet on {to} "
        f"(fresh: {change.fresh}, {change.phase.value}, base {change.base})"
    )
