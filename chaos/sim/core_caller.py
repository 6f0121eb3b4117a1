"""The client library's own core carries out a call: it chooses, retries, waits and gives up.

This is what `agentmem_client.aio` is on a real machine, over virtual time and simulated HTTP. All
decisions are the core's; here is only obeyed. That a call which the core says has certainly not
happened has not, is then checked as it is for any client (`judge`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import CALL_S, Call, Fate
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.web import (
    ASK_PATH,
    READY_PATH,
    Answered,
    Failed,
    Web,
    body_of,
    hashable,
    url_of,
)
from agentmem_client.calls import Call as CoreCall
from agentmem_client.calls import ToOwner
from agentmem_client.core import Exchange
from agentmem_client.errors import NotFound
from agentmem_client.instructions import Done, Fail, Failure, Instruction, Send
from agentmem_client.policy import Policy
from agentmem_client.router import Router
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
        self.router = Router([url_of(name) for name in seeds], chance.random, POLICY)

    def begin(self, call: Call, group: GroupSpec, ended: Callable[[Fate], None]) -> None:
        is_read = call.kind is Kind.READ
        asked: CoreCall[Answer] = CoreCall(
            name="get" if is_read else "update",
            method="GET" if is_read else "PATCH",
            path=f"{ASK_PATH}{group.id}/{call.key}",
            read=lambda body: body,
            route=ToOwner(self._web.owner_of(group.id, call.key)),
            body=body_of(group.id, call.command()),
            idempotency_key=None if is_read else call.request,
        )
        exchange = Exchange(asked, self.router, self._schedule.now_s)
        _Run(self._schedule, exchange, self._send, call, ended).start()

    def _send(self, request: Send, answered: Answered, failed: Failed) -> None:
        """One of the two is called, once, at the latest when the request has taken too long."""
        over = False

        def once(report: Callable[[], None]) -> None:
            nonlocal over
            if not over:
                over = True
                report()

        def in_vain(why: Failure, text: str) -> None:
            once(lambda: failed(why, text))

        self._web.send(
            request, self._chance, lambda *answer: once(lambda: answered(*answer)), in_vain
        )
        self._schedule.after(
            request.timeout_s, lambda: in_vain(Failure.TIMED_OUT, "no answer in time")
        )
        if self.router.has_ill:
            self._probe_the_ill()

    def _probe_the_ill(self) -> None:
        """Ask nodes whose breaker is open whether they are well again, beside the calls."""
        for url in self.router.probes_due(self._schedule.now_s):
            self._probe(url)

    def _probe(self, url: str) -> None:
        patience_s = self.router.policy.probe_s_max
        request = Send(0, "GET", url + READY_PATH, {}, None, patience_s, patience_s)

        def probed(status: int | None) -> None:
            self.router.probed(url, self._schedule.now_s, status)

        self._send(request, lambda status, *_: probed(status), lambda *_: probed(None))


class _Run:
    """One exchange on its way, with all its requests on the wire."""

    def __init__(
        self,
        schedule: Schedule,
        exchange: Exchange[Answer],
        send: Callable[[Send, Answered, Failed], None],
        call: Call,
        ended: Callable[[Fate], None],
    ) -> None:
        self._schedule = schedule
        self._exchange = exchange
        self._send = send
        self._call = call
        self._ended = ended
        self._over = False
        self._steps = 0

    def start(self) -> None:
        self._obey(self._exchange.start(self._schedule.now_s))

    def _obey(self, step: Instruction[Answer]) -> None:
        self._steps += 1
        if isinstance(step, Done):
            self._over = True
            self._answered(step.value)
        elif isinstance(step, Fail):
            self._over = True
            self._failed(step)
        elif isinstance(step, Send):
            self._put_on_the_wire(step)
            self._wake_after(step.patience_s)
        else:
            self._wake_after(step.seconds)

    def _wake_after(self, seconds: float) -> None:
        """Unless something happens before."""
        asked_at = self._steps

        def wake() -> None:
            if asked_at == self._steps and not self._over:
                self._obey(self._exchange.woke(self._schedule.now_s))

        if seconds != math.inf:
            self._schedule.after(seconds, wake)

    def _put_on_the_wire(self, request: Send) -> None:
        attempt = request.attempt

        def report(event: Callable[[float], Instruction[Answer]]) -> None:
            if not self._over:
                self._obey(event(self._schedule.now_s))

        def answered(status: int, headers: Mapping[str, str], body: bytes) -> None:
            report(lambda now: self._exchange.answered(attempt, status, headers, body, now))

        def failed(why: Failure, text: str) -> None:
            report(lambda now: self._exchange.failed(attempt, why, text, now))

        self._send(request, answered, failed)

    def _answered(self, answer: Answer) -> None:
        call = self._call
        call.ok, call.result = bool(answer.get("ok", True)), hashable(answer["value"])
        call.index, call.shard = answer["index"], answer["shard"]
        self._ended(Fate.ANSWERED)

    def _failed(self, step: Fail) -> None:
        error, call = step.error, self._call
        if isinstance(error, NotFound) and call.kind is Kind.READ:
            call.ok, call.result = True, None
            call.index, call.shard = error.details["index"], error.details["shard"]
            self._ended(Fate.ANSWERED)
        elif error.outcome_unknown:
            self._ended(Fate.UNKNOWN)
        else:
            self._ended(Fate.REFUSED)
