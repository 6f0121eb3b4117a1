"""A few nodes in one process, on a virtual clock: enough to play schedules by hand in tests."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest

from agentmem_chaos.sim.disk import SimDisk
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import GroupSpec
from agentmem_cluster.raft.core import NodeCore, Ready
from agentmem_cluster.raft.settings import RaftSettings


class TestClock:
    __test__ = False

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return int(self.now_s * 1000)


class SeededRng:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def random(self) -> float:
        return self._random.random()

    def token(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)


@dataclass
class ListCheckpoint:
    machine: ListMachine
    index: int
    runs: int = 0

    def run(self) -> None:
        self.runs += 1
        if self.machine.checkpoint_broken is not None:
            raise self.machine.checkpoint_broken


class ListMachine:
    """Applies commands by keeping them: the whole state is the list."""

    def __init__(self) -> None:
        self.applied_index = 0
        self.durable_index = 0
        self.commands: list[bytes] = []
        self.batches: list[int] = []
        self.broken: Exception | None = None
        self.checkpoint_broken: Exception | None = None
        self.checkpoints = 0

    def apply(self, entries: Any) -> list[Any]:
        if self.broken is not None:
            raise self.broken
        assert entries[0].index == self.applied_index + 1
        self.batches.append(len(entries))
        results = []
        for entry in entries:
            if entry.command:
                self.commands.append(entry.command)
            results.append(len(self.commands))
        self.applied_index = entries[-1].index
        return results

    def checkpoint(self) -> ListCheckpoint | None:
        if self.applied_index == self.durable_index:
            return None
        self.checkpoints += 1
        return ListCheckpoint(self, self.applied_index)

    def checkpoint_done(self, job: ListCheckpoint) -> None:
        assert job.machine is self
        self.durable_index = job.index

    def digest(self) -> bytes:
        return repr(self.commands).encode()

    def close(self) -> None: ...


@dataclass
class Told:
    """Collects what `done` was called with."""

    outcomes: list[Any] = field(default_factory=list)

    def __call__(self, outcome: Any) -> None:
        self.outcomes.append(outcome)

    @property
    def one(self) -> Any:
        assert len(self.outcomes) == 1, self.outcomes
        return self.outcomes[0]


class World:
    """Nodes `a`, `b`, `c`... with queues between them that the test empties when it likes."""

    def __init__(
        self,
        names: str = "abc",
        *,
        groups: tuple[str, ...] = ("g",),
        settings: RaftSettings | None = None,
        preferred: str | None = None,
    ) -> None:
        self.names = names
        self.preferred = preferred
        self.groups = groups
        self.settings = settings or RaftSettings()
        self.clock = TestClock()
        self.queues: dict[tuple[str, str], deque[Any]] = {
            (a, b): deque() for a in names for b in names if a != b
        }
        self.cut: set[tuple[str, str]] = set()
        self.down: set[str] = set()
        self.boots = dict.fromkeys(names, 0)
        self.disks = {name: SimDisk(random.Random(f"disk/{name}")) for name in names}
        self.journals: dict[str, Journal] = {}
        self.machines = {(n, g): ListMachine() for n in names for g in groups}
        self.cores: dict[str, NodeCore] = {}
        self.pending: dict[str, Ready] = {}
        self.hold_flush: set[str] = set()
        self.session = 0
        for name in names:
            self.boot(name)
        for name in names:
            self.connect(name)

    def boot(self, name: str) -> None:
        self.boots[name] += 1
        self.journals[name] = Journal.open(self.disks[name], segment_bytes=1 << 20)
        core = NodeCore(
            name,
            self.journals[name],
            self.clock,
            SeededRng(f"{name}/{self.boots[name]}"),
            self.settings,
        )
        for group in self.groups:
            spec = GroupSpec(group, 1, tuple(sorted(self.names)), self.preferred)
            core.add_group(spec, self.machines[name, group])
        self.cores[name] = core
        self.pending.pop(name, None)
        self.down.discard(name)

    def connect(self, name: str) -> None:
        for other in self.names:
            if other != name and other not in self.down:
                self.session += 1
                for a, b in ((name, other), (other, name)):
                    self.queues[a, b].clear()
                    self.cores[a].peer_down(b)
                    self.cores[a].peer_up(b, self.session)

    def kill(self, name: str, *, power: bool = False) -> None:
        self.down.add(name)
        self.pending.pop(name, None)
        for other in self.names:
            if other != name:
                self.queues[name, other].clear()
                self.queues[other, name].clear()
                self.cores[other].peer_down(name)
        if power:
            self.disks[name].power_loss()
        else:
            self.disks[name].kill()

    def restart(self, name: str, *, fresh_machines: bool = True) -> None:
        for group in self.groups:
            if fresh_machines:
                self.machines[name, group] = ListMachine()
        self.boot(name)
        self.connect(name)

    def up(self) -> list[str]:
        return [name for name in self.names if name not in self.down]

    def tick(self, name: str) -> None:
        core = self.cores[name]
        ready = core.tick()
        self.send(name)
        if ready is not None and ready.job is not None:
            self.pending[name] = ready
        if name not in self.hold_flush:
            self.flush(name)
        for checkpoint in core.take_checkpoints():
            try:
                checkpoint.job.run()
            except Exception as error:
                core.checkpoint_failed(checkpoint, error)
            else:
                core.checkpointed(checkpoint)

    def flush(self, name: str) -> None:
        ready = self.pending.pop(name, None)
        if ready is not None:
            assert ready.job is not None
            try:
                ready.job.run()
            except OSError as error:
                self.cores[name].sync_failed(ready, error)
            else:
                self.cores[name].synced(ready)
            self.send(name)

    def send(self, name: str) -> None:
        for peer, frames in self.cores[name].take_outbox():
            if peer not in self.down:
                self.queues[name, peer].append(msgpack.packb(frames))

    def deliver(self, sender: str, receiver: str, count: int = 1_000_000) -> int:
        queue = self.queues[sender, receiver]
        delivered = 0
        while queue and delivered < count:
            burst = queue.popleft()
            delivered += 1
            if (sender, receiver) not in self.cut:
                self.cores[receiver].receive(sender, msgpack.unpackb(burst))
        return delivered

    def settle(self, rounds: int = 40) -> None:
        """Let everything that is due happen, without time passing."""
        for _ in range(rounds):
            busy = False
            for name in self.up():
                if self.cores[name].next_wakeup() <= self.clock.now_s:
                    busy = True
                self.tick(name)
            for sender, receiver in self.queues:
                busy |= bool(self.deliver(sender, receiver))
            if not busy:
                return

    def run(self, seconds: float, step_s: float = 0.01) -> None:
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s:
            self.settle()
            self.clock.now_s += step_s
        self.settle()

    def run_until(self, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s:
            self.settle()
            result = condition()
            if result:
                return result
            self.clock.now_s += 0.01
        raise AssertionError("the condition did not come true in time")

    def leaders(self, group: str = "g") -> list[str]:
        return [n for n in self.up() if self.cores[n].is_leader(group)]

    def leader(self, group: str = "g") -> str:
        """The one leader that the others know of."""

        def known() -> str | None:
            leaders = self.leaders(group)
            if len(leaders) != 1:
                return None
            all_know = all(
                self.cores[n].status(group).leader == leaders[0]
                for n in self.up()
                if not {(leaders[0], n), (n, leaders[0])} & self.cut
            )
            return leaders[0] if all_know else None

        found: str = self.run_until(known)
        return found

    def propose(self, name: str, command: bytes, group: str = "g") -> Told:
        told = Told()
        self.cores[name].propose(group, command, told)
        return told

    def read(self, name: str, group: str = "g") -> Told:
        told = Told()
        self.cores[name].read_index(group, told)
        return told

    def isolate(self, name: str) -> None:
        for other in self.names:
            if other != name:
                self.cut |= {(name, other), (other, name)}


@pytest.fixture
def world() -> type[World]:
    """A maker of worlds."""
    return World


@pytest.fixture
def machine() -> type[ListMachine]:
    """A maker of state machines."""
    return ListMachine
