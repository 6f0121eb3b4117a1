"""Changes of epochs, conducted by whoever leads the meta group.

`agentmem_cluster.epochs.conductor` says what is to be done; this asks the nodes for reports and
does it. Nothing is kept here that a new leader would miss: it begins with fresh reports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from agentmem_cluster.epochs import conductor as do
from agentmem_cluster.epochs.change import Change, Phase
from agentmem_cluster.epochs.reports import Report
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import begin_change, end_change, found_epoch, redirect_change
from agentmem_cluster.runtime import Clock
from agentmem_node.service.membership import Membership
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.routing import Routing

log = logging.getLogger("agentmem.changes")

_LOOK_S: Final = 0.1
# After the seal writes wait: every step counts.
_HURRY_S: Final = 0.005
_REPORT_S: Final = 0.5
_CALL_S: Final = 3.0


class Changes:
    def __init__(
        self,
        node_id: str,
        membership: Membership,
        replicas: Replicas,
        routing: Routing,
        link: Link | None,
        clock: Clock,
    ) -> None:
        self._node_id = node_id
        self._membership = membership
        self._replicas = replicas
        self._routing = routing
        self._link = link
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self.reports: dict[str, Mapping[str, Report]] = {}  # the last ones, by change
        # Whether the operation that a change belongs to knows of it; set by the operations.
        self.is_noted: Callable[[Change], bool] = lambda change: True
        membership.on_view.append(lambda _: self._wake.set())

    async def run(self) -> None:
        """For ever: one task for each change, while this node leads the meta group."""
        try:
            while True:
                self._follow()
                self._wake.clear()
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _follow(self) -> None:
        wanted = {}
        if self._membership.leads and self._membership.view is not None:
            wanted = {change.id: change for change in self._membership.view.changes.values()}
        for change_id, task in list(self._tasks.items()):
            # One whose change is over ends by itself: it may be telling the others of that end.
            if self._membership.leads and not task.done():
                continue
            if task.done() and not task.cancelled() and task.exception() is not None:
                log.error("change %s stumbled; trying again", change_id, exc_info=task.exception())
            task.cancel()
            del self._tasks[change_id]
            self.reports.pop(change_id, None)
        for change_id, change in wanted.items():
            if change_id not in self._tasks:
                self._tasks[change_id] = asyncio.create_task(
                    self._conduct(change), name=f"change-{change.shard}"
                )

    async def begin(self, change: Change) -> str:
        """Have the meta group begin a change. Returns what stands in its way, "" for nothing."""
        failpoint("changes.before_begin")
        outcome = await self._membership.propose(begin_change(change))
        failpoint("changes.after_begin")
        await self._membership.tell_all()
        return "" if outcome.ok else outcome.message

    # -- one change ----------------------------------------------------------------------------

    async def _conduct(self, change: Change) -> None:
        conductor = do.Conductor(change, self._clock.monotonic())
        while True:
            current = self._current(change)
            if current is None:
                return
            reports = await self._ask_all(current)
            self.reports[current.id] = reports
            steps = conductor.step(current, reports, self._clock.monotonic())
            outcomes = await asyncio.gather(
                *(self._carry_out(current, step) for step in steps), return_exceptions=True
            )
            for step, outcome in zip(steps, outcomes, strict=True):
                if isinstance(outcome, AgentMemError):
                    log.info("%s of %s: %s; trying again", step, current.shard, outcome)
                elif isinstance(outcome, BaseException):
                    raise outcome
            hurry = current.phase is Phase.FOUNDED or _is_sealed(reports) or bool(steps)
            await asyncio.sleep(_HURRY_S if hurry else _LOOK_S)

    def _current(self, change: Change) -> Change | None:
        view = self._membership.view
        found = None if view is None else view.changes.get(change.shard)
        return found if found is not None and found.id == change.id else None

    async def _ask_all(self, change: Change) -> dict[str, Report]:
        async def ask(node: str) -> Report | None:
            if not self._routing.is_connected(node):
                return None
            if node == self._node_id:
                return self._replicas.set.report(change)
            assert self._link is not None
            body = {"change": change.to_wire()}
            try:
                wire = await self._link.call(node, "replica.report", body, timeout=_REPORT_S)
                return Report.from_wire(node, wire)
            except (AgentMemError, ValueError, TypeError, KeyError) as error:
                log.debug("no report of %s from %s: %r", change.shard, node, error)
                return None

        found = await asyncio.gather(*(ask(node) for node in change.nodes))
        return {report.node: report for report in found if report is not None}

    async def _carry_out(self, change: Change, step: do.Instruction) -> None:
        match step:
            case do.Stage(node, shard, source):
                body: dict[str, Any] = {"change": change.to_wire(), "shard": shard}
                body |= {"source": source, "view": self._membership.view_wire()}
                failpoint("changes.before_stage")
                await self._call(node, "replica.stage", body)
                failpoint("changes.after_stage")
            case do.Checkpoint(node):
                await self._call(node, "replica.checkpoint", _old(change))
            case do.SealOld(node):
                log.info("sealing epoch %d of %s", change.from_epoch, change.shard)
                failpoint("changes.before_seal")
                await self._call(node, "replica.seal", _old(change))
                failpoint("changes.after_seal")
            case do.Found(base):
                log.info("founding epoch %d of %s", change.to_epoch, change.shard)
                failpoint("changes.before_found")
                await self._decide(found_epoch(change.id, change.shard, base))
                failpoint("changes.after_found")
            case do.Redirect(members):
                log.warning("too few new members of %s came: the old ones stay", change.shard)
                preferred = change.targets[0].preferred_leader
                preferred = preferred if preferred in members else members[0]
                await self._decide(redirect_change(change.id, change.shard, members, preferred))
            case do.Finish():
                if not self.is_noted(change):
                    return  # its operation's next look comes soon
                failpoint("changes.before_finish")
                await self._decide(end_change(change.id, change.shard, change.phase))
                failpoint("changes.after_finish")
                log.info("%s serves epoch %d", change.shard, change.to_epoch)
            case do.GiveUp(reason):
                log.warning("giving up the change of %s: %s", change.shard, reason)
                await self._decide(end_change(change.id, change.shard, change.phase))

    async def _decide(self, command: bytes) -> None:
        await self._membership.propose(command)
        await self._membership.tell_all()

    async def _call(self, node: str, method: str, body: dict[str, Any]) -> None:
        if node == self._node_id:
            await self._replicas.handlers[method](node, body)
        elif self._link is not None:
            await self._link.call(node, method, body, timeout=_CALL_S)


def _old(change: Change) -> dict[str, Any]:
    return {"shard": change.shard, "epoch": change.from_epoch}


def _is_sealed(reports: Mapping[str, Report]) -> bool:
    return any(report.old is not None and report.old.seal for report in reports.values())
