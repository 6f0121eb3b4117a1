"""Two clusters of three without a network: the released pysyncobj, and ours.

Frames are delivered by hand, so that a schedule that needs luck on a real network happens here in
every run. The released library is used as it is installed: its default pieces, its own journal.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pysyncobj.syncobj as stock
import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.node import Node
from pysyncobj.transport import Transport


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
