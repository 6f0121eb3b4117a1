"""Two clusters of three without a network: the released pysyncobj, and ours.

Frames are delivered by hand, so that a schedule that needs luck on a real network happens here in
every run. The released library is used as it is installed: its default pieces, its own journal.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack
import pysyncobj.syncobj as stock
import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.schedule import WALL_START_MS, SimRng
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import Entry, GroupSpec, GroupStatus, Role
from agentmem_cluster.raft.core import NodeCore, Ready
from agentmem_cluster.raft.settings import RaftSettings


class StockClock:
    """pysyncobj's clock in our hands. Reading it takes a microsecond, as on a real machine."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


class StockWire(Transport):
    def __init__(self, cluster: StockCluster, me: str) -> None:
        super().__init__(None, None, None)
        self.cluster, self.me = cluster, me
        cluster.wires[me] = self

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        if (self.me, node.id) in self.cluster.cuts:
            return False
        self.cluster.queues[self.me, node.id].append(dict(message))
        return True


class StockMember(SyncObj):
    def __init__(self, cluster: StockCluster, me: str, **conf: Any) -> None:
        others = [Node(name) for name in cluster.names if name != me]
        super().__init__(
            Node(me),
            others,
            SyncObjConf(autoTick=False, **conf),
            transport=StockWire(cluster, me),
        )
        # After the base class: its dumps hold what was assigned later.
        self.applied: list[Any] = []
        self.executions = 0
        for other in others:
            cluster.wires[me]._onNodeConnected(other)

    @replicated
    def put(self, item: Any, padding: bytes = b"") -> Any:
        self.applied.append(item)
        return item

    @replicated
    def fail(self) -> None:
        self.executions += 1
        raise KeyError("the same error on every replica")

    def log(self) -> list[tuple[bytes, int, int]]:
        return list(self._SyncObj__raftLog[:])

    def last_index(self) -> int:
        return int(self._SyncObj__raftLog[-1][1])


class StockCluster:
    def __init__(self, clock: StockClock, names: str = "ABC", **conf: Any) -> None:
        self.clock, self.names = clock, names
        self.queues: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
        self.wires: dict[str, StockWire] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.members = {name: StockMember(self, name, **conf) for name in names}

    def __getitem__(self, name: str) -> StockMember:
        return self.members[name]

    def deliver(self, sender: str, receiver: str, count: int = 1_000_000) -> int:
        queue, delivered = self.queues[sender, receiver], 0
        while queue and delivered < count:
            self.wires[receiver]._onMessageReceived(Node(sender), queue.popleft())
            delivered += 1
        return delivered

    def round(self, live: str | None = None, advance_s: float = 0.0) -> None:
        """One tick of every live member, its heartbeat due, then everything delivered once."""
        live = live or self.names
        self.clock.now_s += advance_s
        for name in live:
            self[name]._SyncObj__newAppendEntriesTime = 0
            self[name].doTick()
        for sender, receiver in list(self.queues):
            if receiver in live:
                self.deliver(sender, receiver)

    def elect(self, name: str, live: str | None = None, rounds: int = 6) -> None:
        self[name]._SyncObj__raftElectionDeadline = 0
        for _ in range(rounds):
            self.round(live)
        assert self[name]._isLeader()


@pytest.fixture
def stock_clock(monkeypatch: pytest.MonkeyPatch) -> StockClock:
    clock = StockClock()
    monkeypatch.setattr(stock, "monotonicTime", clock)
    return clock


@pytest.fixture
def released(stock_clock: StockClock) -> Iterator[SimpleNamespace]:
    """The released library: a maker of clusters, and its clock."""
    logging.disable(logging.CRITICAL)
    yield SimpleNamespace(
        clock=stock_clock,
        cluster=lambda names="ABC", **conf: StockCluster(stock_clock, names, **conf),
        member=StockMember,
    )
    logging.disable(logging.NOTSET)


# -- ours --


class HandClock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return WALL_START_MS + int(self.now_s * 1000)


class ListMachine:
    """Keeps what it applied, in order; durable at checkpoints."""

    def __init__(self, durable: list[Entry]) -> None:
        self.durable = durable
        self.entries = list(durable)

    @property
    def applied_index(self) -> int:
        return self.entries[-1].index if self.entries else 0

    @property
    def durable_index(self) -> int:
        return self.durable[-1].index if self.durable else 0

    @property
    def commands(self) -> list[bytes]:
        return [entry.command for entry in self.entries if entry.command]

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        self.entries += entries
        return [
            ValueError("refused") if entry.command == b"wrong" else entry.command
            for entry in entries
        ]

    def checkpoint(self) -> Any:
        entries, durable = list(self.entries), self.durable
        return SimpleNamespace(run=lambda: durable.__setitem__(slice(None), entries))

    def checkpoint_done(self, job: Any) -> None: ...

    def digest(self) -> bytes:
        return repr(self.entries).encode()

    def close(self) -> None: ...


class OurMember:
    """One node: the real core and journal on a simulated disk."""

    def __init__(self, cluster: OurCluster, name: str, settings: RaftSettings) -> None:
        self.cluster, self.name, self.settings = cluster, name, settings
        self.disk = SimDisk(random.Random(name))
        self.clock = HandClock()
        self.durable: list[Entry] = []
        self.boots = 0
        self.start()

    def start(self) -> None:
        self.boots += 1
        self.journal = Journal.open(self.disk, "journal", segment_bytes=1 << 16)
        self.machine = ListMachine(self.durable)
        self.core = NodeCore(
            self.name,
            self.journal,
            self.clock,
            SimRng(random.Random(f"{self.name}/{self.boots}")),
            self.settings,
            session_of_boot=f"{self.name}{self.boots:07}".encode(),
        )
        spec = GroupSpec("g", 1, tuple(self.cluster.names))
        self.core.add_group(spec, self.machine)

    def restart(self, *, power_loss: bool = False) -> None:
        (self.disk.power_loss if power_loss else self.disk.kill)()
        self.start()
        self.cluster.connect(self.name)

    @property
    def log(self) -> Any:
        return self.journal.group("g", 1)

    @property
    def status(self) -> GroupStatus:
        return self.core.status("g")

    @property
    def is_leader(self) -> bool:
        return self.status.role is Role.LEADER

    def propose(self, command: bytes) -> list[Any]:
        """A list that will hold the outcome."""
        outcome: list[Any] = []
        self.core.propose("g", command, outcome.append)
        return outcome

    def read_index(self) -> list[Any]:
        outcome: list[Any] = []
        self.core.read_index("g", outcome.append)
        return outcome

    def tick(self, *, sync: bool = True) -> Ready | None:
        """Run until nothing is due; frames that may leave go to the queues."""
        for _ in range(1_000):
            ready = self.core.tick()
            self.send()
            if not sync:
                return ready
            if ready is not None:
                self.finish(ready)
            elif self.core.next_wakeup() > self.clock.now_s:
                return None
        raise AssertionError("the core never rests")

    def finish(self, ready: Ready) -> None:
        if ready.job is not None:
            ready.job.run()
        self.core.synced(ready)
        self.send()

    def send(self) -> None:
        for peer, frames in self.core.take_outbox():
            if (self.name, peer) not in self.cluster.cuts:
                self.cluster.queues[self.name, peer] += msgpack.unpackb(msgpack.packb(frames))


class OurCluster:
    def __init__(self, names: str = "ABC", **settings: Any) -> None:
        self.names = names
        self.queues: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self.cuts: set[tuple[str, str]] = set()
        self.sessions = 0
        self.members = {name: OurMember(self, name, RaftSettings(**settings)) for name in names}
        for name in names:
            self.connect(name)

    def __getitem__(self, name: str) -> OurMember:
        return self.members[name]

    def connect(self, name: str) -> None:
        for other in self.names:
            if other != name:
                self.sessions += 1
                for here, there in ((name, other), (other, name)):
                    self.queues[here, there].clear()
                    self.members[here].core.peer_down(there)
                    self.members[here].core.peer_up(there, self.sessions)

    def cut_off(self, name: str) -> None:
        self.cuts = {(x, y) for x in self.names for y in self.names if name in (x, y) and x != y}
        for pair in self.cuts:
            self.queues[pair].clear()

    def deliver(self, sender: str, receiver: str, count: int = 1_000_000) -> None:
        queue = self.queues[sender, receiver]
        frames, queue[:count] = queue[:count], []
        if frames:
            self.members[receiver].core.receive(sender, frames)

    def round(self, live: str | None = None, advance_s: float = 0.0) -> None:
        """Time passes, every live member ticks, and what they said is delivered once."""
        live = live or self.names
        for name in live:
            self[name].clock.now_s += advance_s
            self[name].tick()
        for sender, receiver in sorted(self.queues):
            if receiver in live:
                self.deliver(sender, receiver)
        for name in live:
            self[name].tick()

    def settle(self, live: str | None = None, rounds: int = 8, advance_s: float = 0.01) -> None:
        for _ in range(rounds):
            self.round(live, advance_s)

    def elect(self, name: str, live: str | None = None) -> None:
        """Let everybody else wait until `name` leads."""
        live = live or self.names
        for other in live:
            self[other].clock.now_s += self[other].settings.election_s_min + 0.01
        for _ in range(100):
            self[name].clock.now_s += 0.05
            self[name].tick()
            for sender, receiver in sorted(self.queues):
                if name in (sender, receiver) and receiver in live:
                    self.deliver(sender, receiver)
                    if receiver != name:
                        self[receiver].tick()
            if self[name].is_leader:
                self.settle(live)
                return
        raise AssertionError(f"{name} did not become leader")


@pytest.fixture
def ours() -> Callable[..., OurCluster]:
    """A maker of our clusters."""
    return OurCluster
