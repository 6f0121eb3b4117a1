"""What must hold while shards change hands, checked at the moment when it counts.

- a replica that takes part in an epoch has that on its platter, and begins with the state in which
  the epoch before ended;
- nobody takes part in one epoch with two disks;
- an epoch is founded when a majority of its members has the final state on disk;
- an epoch begins when a majority of the old members has closed the old one, on disk;
- no write is acknowledged by an epoch beyond its seal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.judge import Judge
from agentmem_chaos.sim.schedule import Schedule
from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.record import LocalRecord, RecordCorrupt
from agentmem_cluster.epochs.replicas import Served


class Machine(Protocol):
    name: str
    disk: SimDisk
    incarnation: str
    lost_index: dict[str, int]

    def durable_index(self, group: str) -> int: ...


class EpochJudge:
    def __init__(self, machines: Mapping[str, Machine], judge: Judge, schedule: Schedule) -> None:
        self._machines = machines
        self._judge = judge
        self._schedule = schedule
        self._members: dict[tuple[str, int], tuple[str, ...]] = {}
        self._took_part: dict[tuple[str, str, int], str] = {}
        self._seals: dict[tuple[str, int], tuple[int, float]] = {}  # index, when first applied
        self._founded: set[tuple[str, int]] = set()
        self._begun: set[tuple[str, int]] = set()
        self.begun_changes: set[str] = set()
        self.moves = 0
        self.pauses_s: list[float] = []  # from the seal to the first write that may follow
        self.checks = 0

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
        index = served.machine.inner.applied_index
        if index != spec.base_index or info.epoch == 1:
            return
        ended = self._judge.state_at(info.id, index)
        if ended is not None and not ended.startswith(served.machine.digest()):
            self._judge.accuse(
                "base is the final state",
                f"{machine.name} begins epoch {info.epoch} of {info.id} at {index} with another "
                "state than that in which the epoch before ended",
            )

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
        for target in change.targets:
            holders = [
                member
                for member in target.members
                if self._machines[member].durable_index(target.id) >= change.base.index
                # It had it when it said so. That was true, and one lost disk loses no majority.
                or self._machines[member].lost_index.get(target.id, 0) >= change.base.index
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
        sealed = self._seals.get((shard, epoch - 1))
        if sealed is not None:
            self.pauses_s.append(self._schedule.now_s - sealed[1])
        old = self._members.get((shard, epoch - 1), ())
        closed = []
        for member in old:
            record = _on_disk(self._machines[member])
            if record is not None and record.closed.get(shard, 0) >= epoch - 1:
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
