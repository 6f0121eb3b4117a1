"""Faults in their time: each strikes, holds, is undone, and the cluster's recovery is measured."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentmem_chaos.checkers.base import Crash, Damage, Refusal
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Hosts
from agentmem_chaos.nemeses.base import Field, Nemesis
from agentmem_chaos.nemeses.plan import CALM_BETWEEN_S, Strike
from agentmem_chaos.nemeses.registry import NEMESES
from agentmem_chaos.runs import probe
from agentmem_chaos.runs.observer import Observer
from agentmem_chaos.runs.ready import NOT_WHOLE, wait_ready

STRIKE_S_MAX = 90.0
UNDO_S_MAX = 60.0
READY_S_MAX = 60.0
WATCH_S = 0.1
# Of a node that ends by itself again and again.
RESTARTS_MAX = 3


@dataclass(slots=True)
class Struck:
    """One fault as it happened. `led`: the shards that its victims led at that moment, which is how
    `view` has them: a shard that is split later keeps its name, and not all its owners.

    `ready_s`: from the undoing until every node was ready; None when the next fault came first.
    """

    nemesis: str
    at_s: float
    seed: int
    what: str = ""
    victims: tuple[str, ...] = ()
    led: tuple[str, ...] = ()
    undone_s: float | None = None
    ready_s: float | None = None
    failed: str = ""
    view: Mapping[str, Any] | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "nemesis": self.nemesis,
            "at_s": round(self.at_s, 3),
            "seed": self.seed,
            "what": self.what,
            "victims": list(self.victims),
            "led": list(self.led),
            "undone_s": None if self.undone_s is None else round(self.undone_s, 3),
            "ready_s": None if self.ready_s is None else round(self.ready_s, 3),
            "failed": self.failed,
        }


@dataclass(slots=True)
class Striker:
    """`ending`: set when the run shall end early; a fault that holds is undone at once."""

    hosts: Hosts
    observer: Observer
    now_s: Callable[[], float]
    ending: asyncio.Event
    tell: Callable[[str], None]
    struck: list[Struck] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    _now_striking: Nemesis | None = None
    _may_be_down: set[str] = field(default_factory=set)
    _ready: asyncio.Task[None] | None = None

    async def run(self, strikes: Sequence[Strike], until_s: float) -> None:
        for strike in strikes:
            # Some take longer to strike than was planned: calm comes first all the same.
            undone_s = self.struck[-1].undone_s if self.struck else None
            calm_s = 0.0 if undone_s is None else undone_s + CALM_BETWEEN_S[0]
            await self._until(max(strike.at_s, calm_s))
            if self.ending.is_set() or self.now_s() > until_s:
                break
            await self._strike(strike)
        await self._until(until_s)

    async def _until(self, at_s: float) -> None:
        await self._pause(at_s - self.now_s())

    async def _pause(self, seconds: float) -> None:
        """That long, or until the run ends."""
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.ending.wait()
        except TimeoutError:
            pass

    async def _strike(self, strike: Strike) -> None:
        nemesis = NEMESES[strike.nemesis]()
        if nemesis.wants_whole_cluster:
            await self._whole()
        self._stop_measuring()
        chance = random.Random(f"strike:{strike.seed}")
        field_ = Field(self.hosts, chance, self.observer.leaders, self.observer.members)
        leaders = self.observer.leaders()
        record = Struck(strike.nemesis, self.now_s(), strike.seed, view=self.observer.newest_view())
        self.struck.append(record)
        self._now_striking = nemesis
        try:
            record.what = await asyncio.wait_for(nemesis.strike(field_), STRIKE_S_MAX)
            record.victims = tuple(sorted(nemesis.victims))
            record.led = tuple(s for s, n in sorted(leaders.items()) if n in nemesis.victims)
            self.tell(f"{strike.nemesis}: {record.what}")
            await self._hold(nemesis, strike)
        except (ChaosError, TimeoutError) as error:
            record.failed = str(error) or "it took too long"
            self.tell(f"{strike.nemesis} failed: {record.failed}")
        finally:
            self._may_be_down |= nemesis.victims if nemesis.may_end_nodes else set()
            await self._undo(nemesis, field_, record)
            self._now_striking = None
            if nemesis.damage is not None:
                self.damages.append(nemesis.damage)
            record.undone_s = self.now_s()
        self._ready = asyncio.create_task(self._measure_ready(record))

    async def _undo(self, nemesis: Nemesis, field_: Field, record: Struck) -> None:
        try:
            await asyncio.wait_for(nemesis.undo(field_), UNDO_S_MAX)
        except (ChaosError, TimeoutError) as error:
            record.failed = record.failed or f"undoing it failed: {error}"
            self.tell(f"{record.nemesis}: {record.failed}")

    async def _hold(self, nemesis: Nemesis, strike: Strike) -> None:
        struck_s = self.now_s()
        lost = probe.without_majority(nemesis.sides or (), self.observer.members())
        if lost and strike.hold_s > probe.SETTLE_S:
            await self._pause(probe.SETTLE_S)
            if not self.ending.is_set():
                await asyncio.gather(*(self._probe(n, s) for n, s in self._asked(lost)))
        await self._pause(struck_s + strike.hold_s - self.now_s())

    def _asked(self, lost: dict[str, list[str]]) -> list[tuple[str, str]]:
        """One shard a node: what it says of one it says of all that it cannot reach."""
        return [
            (node, shards[len(self.refusals) % len(shards)])
            for node, shards in lost.items()
            if self.hosts.is_running(node)
        ]

    async def _probe(self, node: str, shard: str) -> None:
        view = self.observer.views.get(node)
        if view is not None:
            owner = probe.owner_in(view, shard)
            self.refusals += await probe.probe(self.hosts, node, shard, owner, self.now_s)

    # -- recovery ---------------------------------------------------------------------------

    async def _measure_ready(self, record: Struck) -> None:
        try:
            record.ready_s = await wait_ready(self.hosts, self.hosts.nodes, READY_S_MAX)
        except ChaosError:
            pass  # told at the end, when the whole cluster is healed
        else:
            self._may_be_down.clear()

    def _stop_measuring(self) -> None:
        if self._ready is not None:
            self._ready.cancel()
            self._ready = None

    async def _whole(self) -> None:
        """Wait for a whole cluster: some faults are survived by the others' copies only."""
        try:
            await wait_ready(self.hosts, self.hosts.nodes, READY_S_MAX, but_for=NOT_WHOLE)
        except ChaosError as error:
            self.tell(f"the cluster is not whole: {error}")

    async def finish(self) -> None:
        self._stop_measuring()

    # -- crashes ----------------------------------------------------------------------------

    async def watch(self) -> None:
        """Until cancelled: note nodes that end although no fault explains it, and start them."""
        while True:
            await asyncio.sleep(WATCH_S)
            striking = self._now_striking
            for node in self.hosts.nodes:
                if self.hosts.is_running(node):
                    continue
                if node in self._may_be_down or (striking and node in striking.victims):
                    continue
                if sum(crash.node == node for crash in self.crashes) >= RESTARTS_MAX:
                    continue
                self.crashes.append(Crash(node, self.now_s(), self.hosts.log_tail(node)))
                self.tell(f"{node} ended by itself")
                await self.hosts.start(node)
