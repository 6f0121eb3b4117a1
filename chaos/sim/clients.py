"""Clients: they think, call (sometimes many at once), and wait for what comes of it.

What they ask for is `workload`'s choice. How a call is carried out, with its retries, is the
choice of a `Caller`: the plain one here, or the client library's own core (`core_caller`). What
may be concluded from an outcome is written down in `Fate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, ParamSpec, Protocol

from agentmem_chaos.checker import Kind, Operation
from agentmem_chaos.sim.machine import Command, Effect
from agentmem_chaos.sim.plan import Engine, WorldPlan
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.story import Story
from agentmem_chaos.sim.workload import Asked, Memories, Registers
from agentmem_cluster.errors import AgentMemError, NotLeader, WrongShard
from agentmem_cluster.raft.api import GroupSpec

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
    value: Hashable = 0
    expected: Hashable = None
    padding: bytes = b""
    fate: Fate = Fate.PENDING
    returned_s: float = 0.0
    ok: bool = False
    result: Hashable = None
    uncertain: bool = False  # some attempt may still take effect
    shard: str = ""  # that answered
    index: int = 0  # of the entry, or of the last one in the state that was read
    order: float | None = None  # where it took effect: at the entry, or just after the last one

    def command(self) -> Command:
        return Command(
            self.request, self.kind.value, self.key, self.value, self.expected, self.padding
        )

    def as_operation(
        self,
        key: str,
        returned_s: float,
        ok: bool,
        result: Hashable,
        order: float | None = None,
    ) -> Operation:
        """`order`: where it took effect, if not at its own."""
        shown = ok if self.kind in (Kind.CAS, Kind.DELETE) else result
        return Operation(
            self.client,
            key,
            self.invoked_s,
            returned_s,
            self.kind,
            self.value,
            self.expected,
            shown,
            self.order if order is None else order,
        )

    def __str__(self) -> str:
        what = f"{self.request} {self.kind.value} {self.group}/{self.key}"
        if self.kind is Kind.CAS:
            what += f" {self.expected}->{self.value}"
        elif self.kind is Kind.DELETE:
            what += f" {self.expected or 'whatever it is'}"
        elif self.kind is not Kind.READ:
            what += f" {self.value}"
        if self.fate is Fate.ANSWERED:
            return f"{what} = {self.result if self.ok else f'no, it is {self.result}'}"
        return f"{what} ({self.fate.value})"


class Seen(NamedTuple):
    """What a read answers: the value, and up to which entry the replica of `shard` had applied."""

    value: Hashable
    applied_index: int
    shard: str


class Written(NamedTuple):
    """What a write answers: what it did, at which entry of which shard."""

    effect: Effect
    at: int
    shard: str


class Server(Protocol):
    """What a client sees of a node. `answer` may never be called."""

    name: str

    def members_of(self, group: str, key: str) -> tuple[str, ...]:
        """Who has the shard of a key, as far as this node knows; empty when it knows nothing."""
        ...

    def propose(
        self, group: str, command: Command, answer: Callable[[Written | AgentMemError, bool], None]
    ) -> None:
        """`answer(outcome, certain)`; an error is certain when the command cannot take effect."""
        ...

    def read(
        self, group: str, key: str, answer: Callable[[Seen | AgentMemError], None]
    ) -> None: ...


class Caller(Protocol):
    """How a client carries out a call, from the first attempt to its fate."""

    def begin(self, call: Call, group: GroupSpec, ended: Callable[[Fate], None]) -> None:
        """`ended(fate)` once, after `call.ok`, `.result` and `.index` are set if it is answered."""
        ...


class Witness(Protocol):
    """Who watches what clients are shown."""

    def seen(self) -> Mapping[str, int]: ...

    def answered(self, call: Call, seen_before: Mapping[str, int]) -> None: ...


class SimClient:
    """A loop: think, call (sometimes many at once), wait for the outcome."""

    def __init__(
        self,
        number: int,
        caller: Caller,
        plan: WorldPlan,
        schedule: Schedule,
        chance: random.Random,
        story: Story,
        calls: list[Call],
        witness: Witness,
    ) -> None:
        self.number = number
        self._caller = caller
        self._witness = witness
        self._plan = plan
        self._schedule = schedule
        self._chance = chance
        self._story = story
        self._calls = calls
        self._sequence = 0
        self._open = 0
        self._workload: dict[str, Registers | Memories] = {
            group.id: self._workload_of(group) for group in plan.asked
        }
        self.stopped = False

    def _workload_of(self, group: GroupSpec) -> Registers | Memories:
        kind = Memories if self._plan.engine_of(group.id) is Engine.SHARD else Registers
        return kind(self.number, self._plan.keys_per_group, self._chance)

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
            group = self._draw_group()
            self.call(group, self._workload[group.id].draw())

    def _draw_group(self) -> GroupSpec:
        if self._plan.quiet_groups and self._chance.random() > QUIET_SHARE:
            return self._plan.asked[0]
        return self._chance.choice(self._plan.asked)

    def probe(self, group: GroupSpec) -> Call:
        """A write, now."""
        return self.call(group, self._workload[group.id].draw_write())

    def call(self, group: GroupSpec, asked: Asked) -> Call:
        chance = self._chance
        self._sequence += 1
        self._open += 1
        call = Call(
            client=self.number,
            group=group.id,
            key=asked.key,
            kind=asked.kind,
            request=f"c{self.number}-{self._sequence}",
            invoked_s=self._schedule.now_s,
            value=asked.value(self._sequence),
            expected=asked.expected,
        )
        if call.kind is not Kind.READ and self._plan.padding_bytes_max and chance.random() < 0.5:
            call.padding = bytes(chance.randrange(self._plan.padding_bytes_max))
        self._calls.append(call)
        seen = self._witness.seen()
        self._caller.begin(call, group, lambda fate: self._ended(call, fate, seen))
        return call

    def _ended(self, call: Call, fate: Fate, seen_before: Mapping[str, int]) -> None:
        call.fate = fate
        call.returned_s = self._schedule.now_s
        workload = self._workload[call.group]
        if fate is Fate.ANSWERED:
            if call.kind is Kind.READ:
                call.order = call.index + 0.5
            self._witness.answered(call, seen_before)
            workload.learn(call.kind, call.key, call.value, call.ok, call.result)
        elif call.kind is not Kind.READ:
            workload.forget(call.key)
        self._story.tell(call.returned_s, f"client {self.number}", str(call))
        self._open -= 1
        if self.idle:
            self._schedule.after(self._chance.uniform(*self._plan.think_s), self._step_when_idle)

    def _step_when_idle(self) -> None:
        if self.idle:
            self._step()


class PlainCaller:
    """Retries any write under its first request id, on whatever node: the ledger makes it safe.

    It knows who it believes leads, what an error said, and the time.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        schedule: Schedule,
        chance: random.Random,
        *,
        moves: bool = False,
        splits: bool = False,
    ) -> None:
        """`moves`: groups change their members, so that one must ask again who they are. `splits`:
        and not all keys of a group are with the same ones."""
        self._moves = moves
        self._splits = splits
        self._servers = servers
        self._schedule = schedule
        self._chance = chance
        self._leader: dict[tuple[str, str], str] = {}
        self._members: dict[tuple[str, str], tuple[str, ...]] = {}

    def begin(self, call: Call, group: GroupSpec, ended: Callable[[Fate], None]) -> None:
        self._attempt(call, group, ended, self._choose(call, group, None))

    def _choose(self, call: Call, group: GroupSpec, hint: str | None) -> str:
        place = self._place(call)
        members = self._members.get(place, group.members)
        if hint in members:
            return str(hint)
        believed = self._leader.get(place)
        if call.kind is not Kind.READ and believed is not None and self._chance.random() < 0.9:
            return believed
        return self._chance.choice(members)

    def _place(self, call: Call) -> tuple[str, str]:
        """Of what it remembers who has it."""
        return call.group, call.key if self._splits else ""

    def _learn(self, call: Call, node: str, outcome: AgentMemError) -> None:
        """Whoever refuses for being the wrong one is asked who has it; of the dead, any other."""
        if not isinstance(outcome, WrongShard):
            node = self._chance.choice(sorted(self._servers))
        members = self._servers[node].members_of(call.group, call.key)
        if members:
            self._members[self._place(call)] = members

    def _attempt(
        self, call: Call, group: GroupSpec, ended: Callable[[Fate], None], node: str
    ) -> None:
        """One try on one node; it ends by an answer or by its time being up."""
        over = False

        def again(hint: str | None, *, certain: bool) -> None:
            nonlocal over
            if over or call.fate is not Fate.PENDING:
                return
            over = True
            call.uncertain |= not certain
            self._leader.pop(self._place(call), None)
            if self._schedule.now_s - call.invoked_s > CALL_S:
                ended(Fate.UNKNOWN if call.uncertain else Fate.REFUSED)
                return
            following = self._choose(call, group, hint)
            self._schedule.after(
                self._chance.uniform(*RETRY_S),
                lambda: self._attempt(call, group, ended, following),
            )

        def written(outcome: Written | AgentMemError, certain: bool) -> None:
            if call.fate is not Fate.PENDING:
                return
            if isinstance(outcome, AgentMemError):
                hint = outcome.leader if isinstance(outcome, NotLeader) else None
                if self._moves and not isinstance(outcome, NotLeader):
                    self._learn(call, node, outcome)
                again(hint, certain=certain)
                return
            effect, call.index, call.shard = outcome
            call.ok, call.result = effect.ok, effect.value
            self._leader[self._place(call)] = node
            ended(Fate.ANSWERED)

        def was_read(outcome: Seen | AgentMemError) -> None:
            if call.fate is not Fate.PENDING:
                return
            if isinstance(outcome, AgentMemError):
                if self._moves:
                    self._learn(call, node, outcome)
                again(None, certain=True)
                return
            call.ok = True
            call.result, call.index, call.shard = outcome
            ended(Fate.ANSWERED)

        def send() -> None:
            server = self._servers[node]
            if call.kind is Kind.READ:
                server.read(group.id, call.key, self._after_delay(was_read))
            else:
                server.propose(group.id, call.command(), self._after_delay(written))

        delay_s = self._delay_s()
        self._schedule.after(delay_s, send)
        self._schedule.after(delay_s + ATTEMPT_S, lambda: again(None, certain=False))

    def _delay_s(self) -> float:
        return self._chance.uniform(0.0001, 0.002)

    def _after_delay(self, action: Callable[P, None]) -> Callable[P, None]:
        def arrive(*args: P.args, **kwargs: P.kwargs) -> None:
            self._schedule.after(self._delay_s(), lambda: action(*args, **kwargs))

        return arrive
