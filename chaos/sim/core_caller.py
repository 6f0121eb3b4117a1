"""The client library's own core carries out a call: it chooses, retries, waits and gives up.

This is what `agentmem_client.aio` is on a real machine, over virtual time and simulated HTTP. All
decisions are the core's; here is only obeyed. That a call which the core says has certainly not
happened has not, is then checked as it is for any client (`judge`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import CALL_S, Call, Fate
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.web import ASK_PATH, Web, body_of, hashable, url_of
from agentmem_client.calls import Call as CoreCall
from agentmem_client.calls import ToOwner
from agentmem_client.core import Done, Exchange, Fail, Failure, Instruction, Send
from agentmem_client.errors import NotFound
from agentmem_client.router import Policy, Router
from agentmem_cluster.raft.api import GroupSpec

Answer = Mapping[str, Any]
# A call has few seconds and a world few clients: several attempts must fit.
POLICY = Policy(deadline_s=CALL_S, attempt_share_max=1 / 5)


class CoreCaller:
    """Implements `clients.Caller` for all calls of one client: they share a router."""

    def __init__(
        self, web: Web, seeds: list[str], schedule: Schedule, chance: random.Random
    ) -> None:
        self._web = web
        self._schedule = schedule
        self._chance = chance
        self._router = Router([url_of(name) for name in seeds], chance.random, POLICY)

    def begin(self, call: Call, group: GroupSpec, ended: Callable[[Fate], None]) -> None:
        is_read = call.kind is Kind.READ
        asked: CoreCall[Answer] = CoreCall(
            name="get" if is_read else "update",
            method="GET" if is_read else "PATCH",
            path=f"{ASK_PATH}{group.id}/{call.key}",
            read=lambda body: body,
            route=ToOwner(self._web.owner_of(group.id)),
            body=body_of(group.id, call.command()),
            idempotency_key=None if is_read else call.request,
        )
        exchange = Exchange(asked, self._router, self._schedule.now_s)
        _Run(self._web, self._schedule, self._chance, exchange, call, ended).start()


class _Run:
    """One exchange on its way."""

    def __init__(
        self,
        web: Web,
        schedule: Schedule,
        chance: random.Random,
        exchange: Exchange[Answer],
        call: Call,
        ended: Callable[[Fate], None],
    ) -> None:
        self._web = web
        self._schedule = schedule
        self._chance = chance
        self._exchange = exchange
        self._call = call
        self._ended = ended

    def start(self) -> None:
        self._obey(self._exchange.start(self._schedule.now_s))

    def _obey(self, step: Instruction[Answer]) -> None:
        if isinstance(step, Done):
            self._answered(step.value)
        elif isinstance(step, Fail):
            self._failed(step)
        elif isinstance(step, Send):
            self._send(step)
        else:
            self._schedule.after(
                step.seconds, lambda: self._obey(self._exchange.woke(self._schedule.now_s))
            )

    def _send(self, request: Send) -> None:
        over = False

        def report(event: Callable[[float], Instruction[Answer]]) -> None:
            nonlocal over
            if not over:
                over = True
                self._obey(event(self._schedule.now_s))

        def answered(status: int, headers: Mapping[str, str], body: bytes) -> None:
            report(lambda now: self._exchange.answered(status, headers, body, now))

        def failed(why: Failure, text: str) -> None:
            report(lambda now: self._exchange.failed(why, text, now))

        self._web.send(request, self._chance, answered, failed)
        self._schedule.after(
            request.timeout_s, lambda: failed(Failure.TIMED_OUT, "no answer in time")
        )

    def _answered(self, answer: Answer) -> None:
        call = self._call
        call.ok, call.result = bool(answer.get("ok", True)), hashable(answer["value"])
        call.index = answer["index"]
        self._ended(Fate.ANSWERED)

    def _failed(self, step: Fail) -> None:
        error, call = step.error, self._call
        if isinstance(error, NotFound) and call.kind is Kind.READ:
            call.ok, call.result = True, None
            call.index = error.details["index"]
            self._ended(Fate.ANSWERED)
        elif error.outcome_unknown:
            self._ended(Fate.UNKNOWN)
        else:
            self._ended(Fate.REFUSED)
