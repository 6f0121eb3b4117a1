"""Counters whose every tick is sent more than once, on purpose, under one Idempotency-Key."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import ClassVar

from agentmem_chaos.workloads.base import Arena, Workload
from agentmem_chaos.workloads.history import Op, Outcome
from agentmem_client import AddResult, AgentMemError

COUNTERS = 4
SENDS_MAX = 3
# How many past ticks a client may send once more, long after they were answered.
REMEMBERED = 50


@dataclass(frozen=True, slots=True)
class _Tick:
    text: str
    owner: str
    key: str


class Counters(Workload):
    name: ClassVar[str] = "counter"
    description: ClassVar[str] = (
        "ticks sent up to three times at once and again later, one key each"
    )
    checkers: ClassVar[tuple[str, ...]] = ("exactly-once",)

    def __init__(self) -> None:
        self._sent: dict[int, list[_Tick]] = {}
        self._serial = 0

    async def step(self, arena: Arena, number: int, chance: random.Random) -> None:
        sent = self._sent.setdefault(number, [])
        if sent and chance.random() < 0.25:
            tick = chance.choice(sent)
            kind = "again"
        else:
            self._serial += 1
            name = f"t{number}.{self._serial}"
            owner = f"counter-{chance.randrange(COUNTERS)}"
            arena.owners[owner] = self.name
            tick = _Tick(f"tick {name}", owner, f"chaos-{arena.seed}-{name}")
            sent.append(tick)
            del sent[:-REMEMBERED]
            kind = "tick"
        op = arena.history.begin(number, kind, tick.text, tick.owner, value=tick.text)
        await self._send(arena, op, tick, number, chance)

    async def _send(
        self, arena: Arena, op: Op, tick: _Tick, number: int, chance: random.Random
    ) -> None:
        count = chance.randint(1, SENDS_MAX)
        # By different clients, whose connections and leaders differ: the copies race.
        senders = [arena.clients[(number + i) % len(arena.clients)] for i in range(count)]
        answers = await asyncio.gather(
            *(
                sender.add(tick.text, user_id=tick.owner, idempotency_key=tick.key)
                for sender in senders
            ),
            return_exceptions=True,
        )
        ids = {str(a.results[0].id) for a in answers if isinstance(a, AddResult)}
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, AgentMemError):
                raise error
            op.code, op.message = error.code, error.message[:300]
        if ids:
            arena.history.returned(op, Outcome.OK, sorted(ids))
        elif any(isinstance(e, AgentMemError) and e.outcome_unknown for e in errors):
            arena.history.returned(op, Outcome.UNKNOWN)
        else:
            arena.history.returned(op, Outcome.FAILED)
