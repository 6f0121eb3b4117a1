"""What must hold while shards change hands, checked at the moment when it counts.

- a replica that takes part in an epoch has that on its platter, and begins with the state in which
  the epoch before ended;
- nobody takes part in one epoch with two disks;
- an epoch is founded when a majority of its members has the final state on disk;
- an epoch begins when a majority of the old members has closed the old one, on disk;
- no write is acknowledged by an epoch beyond its seal;
- a part of a shard that was split has nothing that belongs to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.judge import Judge
from agentmem_chaos.sim.places import Places
from agentmem_chaos.sim.rewinds import Rewinds
from agentmem_chaos.sim.schedule import Schedule
from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.record import LocalRecord, RecordCorrupt
from agentmem_cluster.epochs.replicas import Served
from agentmem_node.storage.restrict import digest_of_part


class Machine(Protocol):
    name: str
    disk: SimDisk
    incarnation: str
    lost_index: dict[str, int]

    def durable_index(self, group: str) -> int: ...


class _Part(NamedTuple):
    """A shard that a split made: of which one, with which slots, and where that one ended."""

    whole: str
    slots: tuple[int, int]
    base_index: int


class EpochJudge:
    def __init__(
        self, machines: Mapping[str, Machine], judge: Judge, schedule: Schedule, places: Places
    ) -> None:
        self._machines = machines
        self._places = places
        self.rewinds = Rewinds(places)
        self._judge = judge
        self._schedule = schedule
        self._members: dict[tuple[str, int], tuple[str, ...]] = {}
        self._took_part: dict[tuple[str, str, int], str] = {}
        self._seals: dict[tuple[str, int], tuple[int, float]] = {}  # index, when first applied
        self._founded: set[tuple[str, int]] = set()
        self._begun: set[tuple[str, int]] = set()
        self._parts: dict[tuple[str, int], _Part] = {}  # by shard and first epoch
        self.begun_changes: set[str] = set()
        self.moves = 0
        self.splits = 0
        self.pauses_s: list[float] = []  # from the seal to the first write that may follow
        self.checks = 0

    def begun(self, change: Change) -> None:
        """The meta group has a change: said by each voter that applies it, again and again."""
        self.begun_changes.add(change.id)
        for target in change.targets:
            if target.id != change.shard:
                self._places.learn(target.id, change.shard)

    def takes_part(self, machine: Machine, served: Served) -> None:
        """A replica is about to be served: at a start again, or for the first time."""
        info, spec = served.info, served.spec
        self.checks += 1
        self._members[info.id, info.epoch] = info.members
        record = _on_disk(machine)
        held = None if record is None else record.held.get(info.id)
        if held is None or held.epoch != info.epoch:
            self._judge.accuse(
                "promises on disk",
                f"{machine.name} takes part in epoch {info.epoch} of {info.id}, and its disk "
                f"says {held}",
            )
        before = self._took_part.setdefault(
            (machine.name, info.id, info.epoch), machine.incarnation
        )
        if before != machine.incarnation:
            self._judge.accuse(
                "amnesia",
                f"{machine.name} takes part in epoch {info.epoch} of {info.id} again, after it "
                "lost the disk on which its votes were",
            )
        state: Any = served.machine.inner
        strays = state.strays((info.slot_start, info.slot_end))
        if strays:
            self._judge.accuse(
                "a part has its own",
                f"{machine.name} takes part in epoch {info.epoch} of {info.id} with {strays} keys "
                f"that are not of its slots {info.slot_start} to {info.slot_end - 1}",
            )
        index = served.machine.inner.applied_index
        if index != spec.base_index or info.epoch == 1:
            return
        digest = served.machine.digest()
        rewind = self.rewinds.of(info.id, info.epoch)
        if rewind is not None and index == rewind.base_index:
            ended: bytes | None = rewind.kept.digest
        else:
            ended = self.state_at(info.id, index, len(digest))
        if ended is not None and not ended.startswith(digest):
            self._judge.accuse(
                "base is the final state",
                f"{machine.name} begins epoch {info.epoch} of {info.id} at {index} with another "
                "state than that in which the epoch before ended",
            )

    def state_at(self, shard: str, index: int, digest_bytes: int) -> bytes | None:
        """As the judge's; but of a part at its beginning, the digest that follows from the whole's.
        One that came late to its epoch begins further on."""
        for (part, _), begun in self._parts.items():
            if part == shard and begun.base_index == index:
                ended = self._judge.state_at(begun.whole, index)
                return ended and digest_of_part(ended[:digest_bytes], *begun.slots)
        return self._judge.state_at(shard, index)

    def first_of(self, shard: str) -> tuple[int, int]:
        """The epoch that a shard began with, and the first entry of its own log."""
        born = {e: part for (s, e), part in self._parts.items() if s == shard}
        epoch = min(born, default=1)
        if not born or born[epoch].whole == shard:
            return 1, 1  # the first shards there were; such a one keeps its name when it is split
        return epoch, born[epoch].base_index + 1

    def slots_of(self, shard: str, epoch: int) -> tuple[int, int]:
        """[first, end) of a shard in an epoch."""
        born = {e: p.slots for (s, e), p in self._parts.items() if s == shard and e <= epoch}
        return born[max(born)] if born else self._places.range_of(shard)

    def sealed(self, shard: str, epoch: int, index: int) -> None:
        """A replica applied the seal of an epoch."""
        known, _ = self._seals.setdefault((shard, epoch), (index, self._schedule.now_s))
        if known != index:
            self._judge.accuse(
                "one seal", f"epoch {epoch} of {shard} was sealed at {known} and at {index}"
            )

    def founded(self, change: Change) -> None:
        """The meta group has an epoch founded: said by each voter that applies it."""
        if (change.shard, change.to_epoch) in self._founded:
            return
        self._founded.add((change.shard, change.to_epoch))
        self.checks += 1
        assert change.base is not None
        self.splits += change.is_split
        if change.source:
            _, sealed_s = self._seals.get((change.shard, change.from_epoch), (0, 0.0))
            kept = self.rewinds.founded(change.source, change.to_epoch, change.base.index, sealed_s)
            self._judge.taken_back(change.shard, kept.effects)
        for target in change.targets:
            if change.is_split:
                slots = target.slot_start, target.slot_end
                part = _Part(change.shard, slots, change.base.index)
                self._parts[target.id, change.to_epoch] = part
            # What was kept is on disk as it was then: it is rebased when its epoch has a base.
            last = self.rewinds.kept[change.source].index if change.source else change.base.index
            holders = [
                member
                for member in target.members
                if self._machines[member].durable_index(target.id) >= last
                # It had it when it said so. That was true, and one lost disk loses no majority.
                or self._machines[member].lost_index.get(target.id, 0) >= last
            ]
            if 2 * len(holders) <= len(target.members):
                self._judge.accuse(
                    "founded on a majority",
                    f"epoch {change.to_epoch} of {target.id} is founded at {change.base.index}, "
                    f"which only {holders} of {list(target.members)} have on disk",
                )

    def began(self, shard: str, epoch: int) -> None:
        """A replica applied the entry with which an epoch takes writes."""
        if (shard, epoch) in self._begun:
            return
        self._begun.add((shard, epoch))
        self.checks += 1
        self.moves += 1
        self.rewinds.began(shard, epoch, self._schedule.now_s)
        part = self._parts.get((shard, epoch))
        whole = shard if part is None else part.whole
        sealed = self._seals.get((whole, epoch - 1))
        if sealed is not None:
            self.pauses_s.append(self._schedule.now_s - sealed[1])
        old = self._members.get((whole, epoch - 1), ())
        closed = []
        for member in old:
            record = _on_disk(self._machines[member])
            if record is not None and record.closed.get(whole, 0) >= epoch - 1:
                closed.append(member)
        if old and 2 * len(closed) <= len(old):
            self._judge.accuse(
                "fence",
                f"epoch {epoch} of {shard} takes writes when only {closed} of {list(old)} have "
                "closed the one before, on disk",
            )

    def acknowledged(self, shard: str, epoch: int, index: int, node: str) -> None:
        """A write took effect, says a replica of that epoch."""
        sealed = self._seals.get((shard, epoch))
        if sealed is not None and index > sealed[0]:
            self._judge.accuse(
                "nothing after the seal",
                f"{node} acknowledged {shard}/{index} in epoch {epoch}, sealed at {sealed[0]}",
            )


def _on_disk(machine: Machine) -> LocalRecord | None:
    """What the strictest power loss would leave of a node's record."""
    try:
        return LocalRecord.load(machine.disk.platter())
    except RecordCorrupt:
        return None
