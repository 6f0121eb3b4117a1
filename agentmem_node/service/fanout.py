"""Asking several shards at once: one replica of each, under one deadline, hedged.

A shard that this node holds is read here. Of the others one connected member is asked, several
shards of it in one call. When that member has not answered after `hedge_s`, or failed, the next
one is asked too, and the first answer counts. Whoever was too slow is asked last for a moment, so
that a node that stands still costs the searches under way one hedge delay, and later ones none. A
shard of which no replica answered in time is
named in the result: what is missing is never hidden.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from agentmem_cluster.errors import (
    AgentMemError,
    DeadlineExceeded,
    MapMoved,
    NoQuorum,
    NotLeader,
    WrongShard,
)
from agentmem_cluster.runtime import Clock
from agentmem_node.service.routing import Routing

T = TypeVar("T")
# (node, shards) -> the answer, or the error, of each shard.
Ask = Callable[[str, Sequence[str]], Awaitable[dict[str, T | AgentMemError]]]

# How long a replica that was too slow once is asked after the others. A node that stands still is
# disconnected soon after (`LinkLimits.silence_s_max`).
_SLOW_S = 1.0
# How long a shard that changes hands is asked for again, and how often.
_MOVING_S_MAX = 2.5
_MOVING_POLL_S = 0.01
# Kept back from the deadline, so that what did arrive can still be merged and sent.
_MERGE_S = 0.02


@dataclass(slots=True)
class Gathered(Generic[T]):
    answers: dict[str, T] = field(default_factory=dict)
    errors: dict[str, AgentMemError] = field(default_factory=dict)  # the last one of a shard

    def missing(self, shards: Sequence[str]) -> list[str]:
        return [shard for shard in shards if shard not in self.answers]

    def refusal(self) -> AgentMemError:
        """Why there is no answer at all: what a replica said, else that none did in time."""
        for error in self.errors.values():
            return error
        return DeadlineExceeded(
            "No replica answered before the deadline of the request.",
            hint="Retry, or allow more time (X-AgentMem-Deadline-Ms).",
        )


class FanOut:
    def __init__(self, routing: Routing, clock: Clock, hedge_s: float) -> None:
        self._routing = routing
        self._clock = clock
        self._hedge_s = hedge_s
        self._slow_until: dict[tuple[str, str], float] = {}  # (shard, node)

    @property
    def hedge_s(self) -> float:
        return self._hedge_s

    def was_slow(self, shard: str, node: str) -> None:
        """Ask this replica last for a moment."""
        self._slow_until[shard, node] = self._clock.monotonic() + _SLOW_S

    def _slow(self, shard: str) -> set[str]:
        if not self._slow_until:
            return set()
        now = self._clock.monotonic()
        for key in [key for key, until in self._slow_until.items() if until <= now]:
            del self._slow_until[key]
        return {node for slow_shard, node in self._slow_until if slow_shard == shard}

    async def gather(self, shards: Sequence[str], ask: Ask[T], deadline: float) -> Gathered[T]:
        """One answer of each shard, as far as there is one in time. Raises DeadlineExceeded only
        when there was no time at all."""
        self._routing.remaining(deadline)
        run = _Run(self._routing, ask, self._slow)
        try:
            run.launch(shards)
            hedged = False
            moving_until = min(deadline, self._clock.monotonic() + _MOVING_S_MAX)
            while run.pending:
                if not run.tasks:
                    # All said that the shard is elsewhere, or between two leaders: it takes a
                    # moment until they, or this node, know where.
                    if self._clock.monotonic() >= moving_until - _MERGE_S:
                        break
                    self._routing.on_stale_map()
                    await asyncio.sleep(_MOVING_POLL_S)
                    run.again()
                    continue
                left = deadline - _MERGE_S - self._clock.monotonic()
                if left <= 0:
                    break
                done, _ = await asyncio.wait(
                    run.tasks,
                    timeout=left if hedged else min(left, self._hedge_s),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done and not hedged:
                    hedged = True
                    for node, waited_for in run.tasks.values():
                        for shard in run.pending.intersection(waited_for):
                            self.was_slow(shard, node)
                    run.launch(sorted(run.pending), hedge=True)
                for task in done:
                    run.collect(task)
            return run.gathered
        finally:
            for task in run.tasks:
                task.cancel()


class _Run(Generic[T]):
    """One fan-out under way."""

    def __init__(self, routing: Routing, ask: Ask[T], slow: Callable[[str], set[str]]) -> None:
        self.gathered: Gathered[T] = Gathered()
        self.pending: set[str] = set()
        self.tasks: dict[asyncio.Task[dict[str, T | AgentMemError]], tuple[str, list[str]]] = {}
        self._tried: dict[str, set[str]] = {}
        self._routing = routing
        self._ask = ask
        self._slow = slow

    def launch(self, shards: Sequence[str], *, hedge: bool = False) -> None:
        """Ask a replica that was not asked yet for each shard."""
        by_node: dict[str, list[str]] = {}
        for shard in shards:
            tried = self._tried.setdefault(shard, set())
            slow = self._slow(shard)
            node = self._routing.replica_for_read(shard, tried | slow) if slow else None
            node = node or self._routing.replica_for_read(shard, tried)
            if node is None:
                if not hedge and not self._is_asked(shard):
                    if isinstance(self.gathered.errors.get(shard), WrongShard | NotLeader):
                        continue  # pending: it is only changing hands
                    self.pending.discard(shard)
                    self.gathered.errors.setdefault(
                        shard,
                        NoQuorum(
                            f"No replica of shard {shard} can be reached.",
                            hint="`agentmem cluster status` shows which nodes are up.",
                            shard=shard,
                        ),
                    )
                continue
            tried.add(node)
            self.pending.add(shard)
            by_node.setdefault(node, []).append(shard)
        for node, wanted in by_node.items():
            task = asyncio.ensure_future(self._ask(node, wanted))
            self.tasks[task] = (node, wanted)

    def collect(self, task: asyncio.Task[dict[str, T | AgentMemError]]) -> None:
        _, wanted = self.tasks.pop(task)
        error = task.exception()
        if isinstance(error, MapMoved):
            raise error
        if error is not None and not isinstance(error, AgentMemError):
            raise error
        answers: dict[str, Any] = dict.fromkeys(wanted, error) if error else task.result()
        again = []
        for shard in wanted:
            if shard not in self.pending:
                continue
            answer = answers.get(shard)
            if answer is None or isinstance(answer, AgentMemError):
                if answer is not None:
                    self.gathered.errors[shard] = answer
                if not self._is_asked(shard):
                    again.append(shard)
                continue
            self.gathered.answers[shard] = answer
            self.pending.discard(shard)
        if again:
            self.launch(again)

    def again(self) -> None:
        """Ask every replica of what is pending once more."""
        for shard in self.pending:
            self._tried[shard].clear()
        self.launch(sorted(self.pending))

    def _is_asked(self, shard: str) -> bool:
        return any(shard in wanted for _, wanted in self.tasks.values())
