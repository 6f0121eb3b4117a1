"""Clients: they write, compare-and-set, add and read, retry with the same request id, and give up.

A client knows what a real one knows: who it believes leads, what an error said, and the time. It
retries any write under its first request id, on whatever node, because the ledger makes that
safe; what it may conclude from an error is written down in `Fate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, ParamSpec, Protocol

from agentmem_chaos.checker import Kind, Operation
from agentmem_chaos.sim.machine import Command, Effect
from agentmem_chaos.sim.plan import WorldPlan
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.story import Story
from agentmem_cluster.errors import AgentMemError, NotLeader
from agentmem_cluster.raft.api import Applied, GroupSpec

P = ParamSpec("P")

ATTEMPT_S = 1.0  # how long one node may take to answer
CALL_S = 6.0  # after this the client gives up
RETRY_S = (0.02, 0.2)
BURST_CALLS_MAX = 16
QUIET_SHARE = 0.02  # of the calls go to just any group where most are quiet
BURST_CHANCE = 0.08


class Fate(Enum):
    PENDING = "pending"
    ANSWERED = "answered"
    REFUSED = "refused"  # every attempt was refused at once: certainly not done
    UNKNOWN = "unknown"


@dataclass(slots=True, eq=False)
class Call:
    """One operation as its client sees it."""

    client: int
    group: str
    key: str
    kind: Kind
    request: str
    invoked_s: float
    value: int = 0
    expected: int | None = None
    padding: bytes = b""
    fate: Fate = Fate.PENDING
    returned_s: float = 0.0
    ok: bool = False
    result: int | None = None
    uncertain: bool = False  # some attempt may still take effect
    order: float | None = None  # index of the entry, or just after the last one that was read

    def command(self) -> Command:
        return Command(
            self.request, self.kind.value, self.key, self.value, self.expected, self.padding
        )

    def as_operation(self, key: str, returned_s: float, ok: bool, result: int | None) -> Operation:
        shown = ok if self.kind is Kind.CAS else result
        return Operation(
            self.client,
            key,
            self.invoked_s,
            returned_s,
            self.kind,
            self.value,
            self.expected,
            shown,
            self.order,
        )

    def __str__(self) -> str:
        what = f"{self.request} {self.kind.value} {self.group}/{self.key}"
        if self.kind is Kind.CAS:
            what += f" {self.expected}->{self.value}"
        elif self.kind is not Kind.READ:
            what += f" {self.value}"
        if self.fate is Fate.ANSWERED:
            return f"{what} = {self.result if self.ok else f'no, it is {self.result}'}"
        return f"{what} ({self.fate.value})"


class Seen(NamedTuple):
    """What a read answers: the value, and up to which entry the replica had applied."""

    value: int | None
    applied_index: int


class Server(Protocol):
    """What a client sees of a node. `answer` may never be called."""

    name: str

    def propose(
        self, group: str, command: Command, answer: Callable[[Applied | AgentMemError, bool], None]
    ) -> None:
        """`answer(outcome, certain)`; an error is certain when the command cannot take effect."""
        ...

    def read(
        self, group: str, key: str, answer: Callable[[Seen | AgentMemError], None]
    ) -> None: ...


class SimClient:
    """A loop: think, call (sometimes many at once), wait for the outcome."""

    def __init__(
        self,
        number: int,
        servers: Mapping[str, Server],
        plan: WorldPlan,
        schedule: Schedule,
        chance: random.Random,
        story: Story,
        calls: list[Call],
    ) -> None:
        self.number = number
        self._servers = servers
        self._plan = plan
        self._schedule = schedule
        self._chance = chance
        self._story = story
        self._calls = calls
        self._sequence = 0
        self._open = 0
        self._leader: dict[str, str] = {}
        self._seen: dict[tuple[str, str], int | None] = {}
        self.stopped = False

    def start(self) -> None:
        self._schedule.after(self._chance.uniform(0.0, 1.0), self._step)

    @property
    def idle(self) -> bool:
        return self._open == 0

    def _step(self) -> None:
        if self.stopped:
            return
        burst = self._chance.random() < BURST_CHANCE
        for _ in range(self._chance.randint(2, BURST_CALLS_MAX) if burst else 1):
            self.call(self._draw_group(), self._draw_kind())

    def _draw_group(self) -> GroupSpec:
        if self._plan.quiet_groups and self._chance.random() > QUIET_SHARE:
            return self._plan.groups[0]
        return self._chance.choice(self._plan.groups)

    def _draw_kind(self) -> Kind:
        return self._chance.choice(
            [Kind.READ, Kind.READ, Kind.READ, Kind.WRITE, Kind.WRITE, Kind.CAS, Kind.ADD]
        )

    def call(
        self, group: GroupSpec, kind: Kind, done: Callable[[Call], None] = lambda call: None
    ) -> Call:
        chance = self._chance
        self._sequence += 1
        self._open += 1
        number = chance.randrange(self._plan.keys_per_group)
        key = f"k{number}"
        if kind is Kind.ADD or (kind is Kind.READ and chance.random() < 0.25):
            key = f"sum{number}"  # adds have keys of their own, so that no write hides a lost one
        call = Call(
            client=self.number,
            group=group.id,
            key=key,
            kind=kind,
            request=f"c{self.number}-{self._sequence}",
            invoked_s=self._schedule.now_s,
        )
        if kind is Kind.ADD:
            call.value = chance.randint(1, 3)
        elif kind is not Kind.READ:
            call.value = self.number * 1_000_000 + self._sequence
        if kind is Kind.CAS:
            call.expected = self._seen.get((group.id, key))
        if kind is not Kind.READ and self._plan.padding_bytes_max and chance.random() < 0.5:
            call.padding = bytes(chance.randrange(self._plan.padding_bytes_max))
        self._calls.append(call)
        self._attempt(call, group, done, self._choose(call, group, None))
        return call

    def _choose(self, call: Call, group: GroupSpec, hint: str | None) -> str:
        if hint in group.members:
            return str(hint)
        believed = self._leader.get(group.id)
        if call.kind is not Kind.READ and believed is not None and self._chance.random() < 0.9:
            return believed
        return self._chance.choice(group.members)

    def _attempt(
        self, call: Call, group: GroupSpec, done: Callable[[Call], None], node: str
    ) -> None:
        """One try on one node; it ends by an answer or by its time being up."""
        over = False

        def again(hint: str | None, *, certain: bool) -> None:
            nonlocal over
            if over or call.fate is not Fate.PENDING:
                return
            over = True
            call.uncertain |= not certain
            self._leader.pop(group.id, None)
            if self._schedule.now_s - call.invoked_s > CALL_S:
                self._finish(call, Fate.UNKNOWN if call.uncertain else Fate.REFUSED, done)
                return
            following = self._choose(call, group, hint)
            self._schedule.after(
                self._chance.uniform(*RETRY_S),
                lambda: self._attempt(call, group, done, following),
            )

        def written(outcome: Applied | AgentMemError, certain: bool) -> None:
            if call.fate is not Fate.PENDING:
                return
            if isinstance(outcome, AgentMemError):
                hint = outcome.leader if isinstance(outcome, NotLeader) else None
                again(hint, certain=certain)
                return
            effect: Effect = outcome.result
            call.ok, call.result = effect.ok, effect.value
            self._leader[group.id] = node
            self._finish(call, Fate.ANSWERED, done)

        def was_read(outcome: Seen | AgentMemError) -> None:
            if call.fate is not Fate.PENDING:
                return
            if isinstance(outcome, AgentMemError):
                again(None, certain=True)
                return
            call.ok, call.result = True, outcome.value
            call.order = outcome.applied_index + 0.5
            self._finish(call, Fate.ANSWERED, done)

        def send() -> None:
            server = self._servers[node]
            if call.kind is Kind.READ:
                server.read(group.id, call.key, self._after_delay(was_read))
            else:
                server.propose(group.id, call.command(), self._after_delay(written))

        delay_s = self._delay_s()
        self._schedule.after(delay_s, send)
        self._schedule.after(delay_s + ATTEMPT_S, lambda: again(None, certain=False))

    def _finish(self, call: Call, fate: Fate, done: Callable[[Call], None]) -> None:
        call.fate = fate
        call.returned_s = self._schedule.now_s
        if fate is Fate.ANSWERED:
            self._seen[call.group, call.key] = call.result
        self._story.tell(call.returned_s, f"client {self.number}", str(call))
        self._open -= 1
        done(call)
        if self.idle:
            self._schedule.after(self._chance.uniform(*self._plan.think_s), self._step_when_idle)

    def _step_when_idle(self) -> None:
        if self.idle:
            self._step()

    def _delay_s(self) -> float:
        return self._chance.uniform(0.0001, 0.002)

    def _after_delay(self, action: Callable[P, None]) -> Callable[P, None]:
        def arrive(*args: P.args, **kwargs: P.kwargs) -> None:
            self._schedule.after(self._delay_s(), lambda: action(*args, **kwargs))

        return arrive
