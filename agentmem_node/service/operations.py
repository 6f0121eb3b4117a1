"""Operations: what operators, and the cluster itself, want of the shards' places, step by step.

The meta group keeps them, so they go on when its leader is lost. Each step is one change of one
shard's epoch, and the next begins when it is over: an operation that is stopped or cut off leaves
every shard either where it was or where it was to go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from agentmem_cluster import placement
from agentmem_cluster.epochs.change import Change, Phase
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.errors import AgentMemError, Conflict, NotLeader, Unavailable
from agentmem_cluster.invariants import check_cluster
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import LEVEL_OF_CHANGES, Outcome, kv_delete, kv_put, remove_node
from agentmem_cluster.nodestate import NodeState
from agentmem_cluster.runtime import Clock, Rng
from agentmem_node.model import operations as ops
from agentmem_node.model.times import format_ms, parse_time_ms
from agentmem_node.service.changes import Changes
from agentmem_node.service.contract import Caller
from agentmem_node.service.membership import Membership
from agentmem_node.service.rewinding import rewind_steps
from agentmem_node.service.stored_operations import StoredOperation, StoredStep
from agentmem_node.service.survey import NodeReport, Survey
from agentmem_node.service.view import NODE_STATE, OPERATION, ROOTS, View

log = logging.getLogger("agentmem.operations")

_LOOK_S: Final = 0.2
_CALL_S: Final = 2.0
_ID_BYTES: Final = 4
# What a change costs those who write, as measured (docs/operations.md).
_PAUSE_MS_EXPECTED: Final = 200
# Operations that are over and still shown.
_KEPT_MAX: Final = 20
DRAINING: Final = "draining"
REMOVED: Final = "removed"


class Operations:
    def __init__(
        self,
        node_id: str,
        membership: Membership,
        changes: Changes,
        survey: Survey,
        link: Link | None,
        clock: Clock,
        rng: Rng,
        replication: int,
    ) -> None:
        self._node_id = node_id
        self._membership = membership
        self._changes = changes
        self._survey = survey
        self._link = link
        self._clock = clock
        self._rng = rng
        self._replication = replication
        self._advancing = asyncio.Lock()
        changes.is_noted = self.is_noted
        # Where backups may be read from; the node's configuration says so.
        self.backups_at: Callable[[str | None], str] = _nowhere
        if link is not None:
            link.register("operations.list", self._on_list)
            link.register("operations.control", self._on_control)

    # -- what operators ask --------------------------------------------------------------------

    async def plan(self, wish: ops.OperationWish) -> ops.OperationPlan:
        """What `begin` would do now. Raises InvalidField, NotFound, BadRequest, Conflict."""
        view = self._membership.require_view()
        steps = await self._steps_of(wish, view)
        sizes = _sizes(await self._survey.take(view))
        planned = [_planned(step, view, sizes) for step in steps]
        pause_ms = _PAUSE_MS_EXPECTED if steps else 0
        return ops.OperationPlan(
            wish=wish,
            steps=planned,
            bytes=sum(step.bytes for step in planned),
            pause_ms_expected=pause_ms,
            warnings=self._warnings(wish, view),
        )

    async def begin(self, caller: Caller, wish: ops.OperationWish) -> ops.Operation:
        """Plan again, keep it, and let the meta group's leader carry it out.

        Once for each `caller.request_id`: who had no answer may ask again.
        """
        view = self._membership.require_view()
        self._require_level(view)
        drawn = caller.request_id or self._rng.token(_ID_BYTES)
        operation_id = f"{wish.kind}-{drawn[:_ID_BYTES].hex()}"
        for begun in self.stored(view):
            if begun.id == operation_id and begun.wish == wish:
                return begun.shown({})
        for running in self.stored(view):
            if running.state in ("running", "stopped") and running.by != "cluster":
                raise Conflict(
                    f"Operation {running.id} ({running.wish.kind}) is {running.state}.",
                    hint=f"Wait for it, or `agentmem cluster stop {running.id}` and resume it "
                    "later; one at a time changes the cluster's shape.",
                    operation=running.id,
                )
        steps = await self._steps_of(wish, view)
        if wish.kind in ("drain", "remove"):
            await self._put_state(str(wish.node), DRAINING)
        elif wish.kind == "undrain":
            await self._drop_state(str(wish.node))
        elif wish.kind == "split" and not view.roots:
            await self._propose(kv_put(ROOTS, b"%d" % len(view.map.shards)))
        return await self.store_new(wish, steps, caller.key_id or "anybody", operation_id)

    async def store_new(
        self,
        wish: ops.OperationWish,
        steps: Sequence[StoredStep],
        by: str,
        operation_id: str | None = None,
    ) -> ops.Operation:
        view = self._membership.require_view()
        sizes = _sizes(await self._survey.take(view))
        for step in steps:
            planned = _planned(step, view, sizes)
            step.bytes, step.from_members = planned.bytes, planned.from_members
        stored = StoredOperation(
            id=operation_id or f"{wish.kind}-{self._rng.token(_ID_BYTES).hex()}",
            wish=wish,
            created_at=format_ms(self._clock.wall_ms()),
            by=by,
            steps=list(steps),
        )
        await self._keep(stored)
        return stored.shown({})

    async def listed(self) -> list[ops.Operation]:
        """Newest first, as the meta group's leader sees them: what was begun a moment ago is there,
        with its progress. What this node knows, when no leader can be reached."""
        try:
            return await self._listed_by_leader()
        except AgentMemError as error:
            log.debug("no operations from the leader of the meta group: %s", error)
            return self._listed_here()

    async def get(self, operation_id: str) -> ops.Operation:
        """Raises NotFound; not before the leader has been asked, since what was begun a moment ago
        may not have come here yet: Unavailable and its like say that there is none to ask."""
        unasked: AgentMemError | None = None
        try:
            found = await self._listed_by_leader()
        except AgentMemError as error:
            unasked, found = error, self._listed_here()
        for operation in found:
            if operation.id == operation_id:
                return operation
        raise unasked or ops.unknown("operation", operation_id, [one.id for one in found])

    async def _listed_by_leader(self) -> list[ops.Operation]:
        if self._link is None:
            return self._listed_here()
        if self._membership.leads:
            # One that was deposed a moment ago raises.
            return self._listed_in(await self._membership.confirmed_view())
        wire = await self._membership.ask_leader("operations.list", {}, _CALL_S)
        return msgspec.json.decode(wire, type=list[ops.Operation])

    def _listed_here(self) -> list[ops.Operation]:
        return self._listed_in(self._membership.require_view())

    def _listed_in(self, view: View) -> list[ops.Operation]:
        progress = self._progress_here()
        found = sorted(self.stored(view), key=lambda one: one.created_at, reverse=True)
        return [one.shown(progress.get(one.id, {})) for one in found]

    async def _on_list(self, _peer: str, _body: dict[str, Any]) -> bytes:
        view = await self._membership.confirmed_view()  # only the leader can
        return msgspec.json.encode(self._listed_in(view))

    async def control(self, operation_id: str, action: str) -> ops.Operation:
        """Stop: no further step begins, the one under way ends. Resume: go on.

        Done where the steps are begun, so that the two cannot overwrite each other.
        """
        if self._membership.leads or self._link is None:
            return await self._control_here(operation_id, action)
        body = {"operation": operation_id, "action": action}
        wire = await self._membership.ask_leader("operations.control", body, _CALL_S)
        return msgspec.json.decode(wire, type=ops.Operation)

    async def _on_control(self, _peer: str, body: dict[str, Any]) -> bytes:
        self._must_lead()
        return msgspec.json.encode(await self._control_here(body["operation"], body["action"]))

    def _must_lead(self) -> None:
        if not self._membership.leads:
            raise NotLeader("This node does not lead the meta group.")

    async def _control_here(self, operation_id: str, action: str) -> ops.Operation:
        async with self._advancing:
            return await self._control(operation_id, action)

    async def _control(self, operation_id: str, action: str) -> ops.Operation:
        stored = self._find(operation_id)
        wanted, becomes = ("running", "stopped") if action == "stop" else ("stopped", "running")
        if action == "resume" and stored.state == "failed":
            for step in stored.steps:
                if step.state == "failed":
                    step.state, step.error = "pending", ""
            wanted = "failed"
        if stored.state == becomes:
            return stored.shown({})
        if stored.state != wanted:
            raise Conflict(
                f"Operation {operation_id} is {stored.state}: it cannot {action}.",
                hint="`agentmem cluster operations` shows what there is.",
            )
        stored.state = "stopped" if becomes == "stopped" else "running"
        stored.message = ""
        await self._keep(stored)
        return stored.shown({})

    async def check(self) -> list[ops.Finding]:
        """Every invariant of the cluster, held or not."""
        view = self._membership.require_view()
        reports = await self._survey.take(view)
        meta = () if view.meta is None else view.meta.members
        found = check_cluster(
            view.map,
            self.node_states(view, set(reports)),
            {name: report.replicas for name, report in reports.items()},
            self._replication,
            meta,
        )
        return [ops.Finding(name=f.name, ok=f.ok, message=f.message) for f in found]

    # -- planning ------------------------------------------------------------------------------

    def node_states(self, view: View, up: set[str]) -> dict[str, NodeState]:
        names = {*view.nodes, *view.map.nodes()}
        return {
            name: NodeState(
                name,
                zone=view.nodes[name].zone if name in view.nodes else "",
                is_draining=view.states.get(name) == DRAINING,
                is_lost=name in self._membership.lost,
                is_up=name in up,
            )
            for name in sorted(names)
            if view.states.get(name) != REMOVED
        }

    def _up(self, view: View) -> set[str]:
        names = {*view.nodes, *view.map.nodes()}
        return {name for name in names if self._membership.is_connected(name)}

    async def _steps_of(self, wish: ops.OperationWish, view: View) -> list[StoredStep]:
        if wish.kind != "rewind":
            return self._steps(wish, view)
        wish.check()
        until_ms = None if wish.at is None else parse_time_ms(wish.at, "at")
        return await rewind_steps(view, self.backups_at(wish.url), wish.backup, until_ms)

    def _steps(self, wish: ops.OperationWish, view: View) -> list[StoredStep]:
        wish.check()
        nodes = self.node_states(view, self._up(view))
        for name in (wish.node, wish.away_from):
            if name is not None and name not in nodes:
                raise ops.unknown("node", name, nodes)
        if wish.shard is not None and wish.shard not in view.map.shards:
            raise ops.unknown("shard", wish.shard, view.map.shards)
        replication = self._replication
        node, shard = wish.node or "", wish.shard or ""
        match wish.kind:
            case "move":
                steps = placement.plan_move(view.map, nodes, shard, node, away_from=wish.away_from)
            case "drain":
                steps = placement.plan_drain(view.map, nodes, node, replication)
            case "remove":
                steps = placement.plan_remove(view.map, nodes, node, replication)
            case "rebalance":
                steps = placement.plan_rebalance(view.map, nodes, replication)
            case "split":
                split = placement.split_ranges(view.map, shard, wish.at_slot)
                info = view.map.shards[shard]
                return [
                    StoredStep(
                        shard=shard,
                        members=list(info.members),
                        preferred=info.preferred_leader,
                        reason=f"slots from {split.new_slots[0]} on become {split.new_shard}",
                        new_shard=split.new_shard,
                        at_slot=split.new_slots[0],
                    )
                ]
            case _:
                steps = []
        return [stored_step(step) for step in steps]

    def _warnings(self, wish: ops.OperationWish, view: View) -> list[str]:
        warnings = []
        # Those without a shard too: one that has just joined is left out of the plan silently.
        there = {name for name in view.nodes if view.states.get(name) != REMOVED}
        down = sorted({*view.map.nodes(), *there} - self._up(view))
        if down:
            warnings.append(f"Not connected: {', '.join(down)}.")
        if view.changes:
            warnings.append(f"Under way already: changes of {', '.join(sorted(view.changes))}.")
        if wish.kind == "rewind":
            warnings.append(
                "What was written since that moment is in no shard any more: make a backup first."
            )
        if wish.kind == "remove":
            warnings.append(f"Node {wish.node} is forgotten afterwards; stop its process then.")
        return warnings

    def _require_level(self, view: View) -> None:
        old = [n for n, info in view.nodes.items() if info.level < LEVEL_OF_CHANGES]
        if old:
            raise Unavailable(
                f"Shards cannot be moved yet: {', '.join(sorted(old))} run an older version.",
                hint="Upgrade these nodes first; after a move, going back to it is not possible.",
            )

    # -- carrying out --------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: as the leader of the meta group, begin each next step and note what ended."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._membership.leads:
                continue
            try:
                for stored in self.stored(self._membership.require_view()):
                    if stored.state in ("running", "stopped"):
                        await self._advance_one(stored.id)
                await self._forget_old()
            except AgentMemError as error:
                log.info("operations: %s; trying again", error)

    async def _advance_one(self, operation_id: str) -> None:
        """What one operation stumbles over holds up no other."""
        try:
            async with self._advancing:
                await self._advance(self._find(operation_id))
        except AgentMemError as error:
            log.info("operation %s: %s; trying again", operation_id, error)
        except Exception:
            log.exception("operation %s cannot go on", operation_id)

    async def _advance(self, stored: StoredOperation) -> None:
        view = self._membership.require_view()
        current = next((s for s in stored.steps if s.state not in ("done", "failed")), None)
        change = None if current is None else view.changes.get(current.shard)
        is_under_way = change is not None and change.operation == stored.id
        if stored.state != "running" and not (stored.state == "stopped" and is_under_way):
            return
        if current is None:
            await self._end(stored)
            return
        if change is not None and change.operation != stored.id:
            return  # another operation has this shard; its turn comes
        info = view.map.shards.get(current.shard)
        before = (current.state, current.epoch, stored.begun)
        if change is not None:
            current.epoch = change.to_epoch  # who began it may not have come to note it
            current.state = "founded" if change.phase is Phase.FOUNDED else "copying"
        elif info is None:
            current.state, current.error = "failed", "there is no such shard any more"
        elif _is_reached(current, view):
            current.state = "done"
        elif current.state == "pending" and info.members != tuple(current.from_members):
            # Somebody else has moved it since this was planned: to go on would undo that.
            if stored.by == "cluster":
                current.state = "done"  # healing looks again, and plans anew what is still amiss
            else:
                current.state, current.error = "failed", "it was moved meanwhile: plan again"
                stored.state, stored.message = "failed", f"{current.shard}: {current.error}"
        elif current.state != "pending":
            current.state, current.error = "failed", "it was given up; the old members serve"
            stored.state, stored.message = "failed", f"{current.shard}: {current.error}"
        else:
            stored.begun += 1
            current.epoch = info.epoch + 1
            begun = current.change(view.map, f"{stored.id}.{stored.begun}", stored.id)
            refusal = await self._changes.begin(begun)
            if refusal:
                raise Conflict(refusal)
            current.state = "copying"
        if (current.state, current.epoch, stored.begun) != before:
            await self._keep(stored)

    async def _end(self, stored: StoredOperation) -> None:
        node = stored.wish.node
        if stored.wish.kind == "remove" and node is not None:
            view = self._membership.require_view()
            if view.meta is not None and node in view.meta.members:
                await self._note(stored, "it waits for the meta group to move to other voters")
                return
            await self._put_state(node, REMOVED)
            await self._propose(remove_node(node), may_be_gone=True)
        stored.state, stored.message = "done", ""
        await self._keep(stored)
        log.info("operation %s is done", stored.id)

    async def _note(self, stored: StoredOperation, message: str) -> None:
        if stored.message != message:
            stored.message = message
            await self._keep(stored)

    async def _forget_old(self) -> None:
        view = self._membership.require_view()
        over = sorted(
            (s for s in self.stored(view) if s.state in ("done", "failed")),
            key=lambda one: one.created_at,
        )
        for stored in over[: max(0, len(over) - _KEPT_MAX)]:
            await self._propose(kv_delete(OPERATION + stored.id), may_be_gone=True)

    # -- progress ------------------------------------------------------------------------------

    def _progress_here(self) -> dict[str, dict[str, dict[str, Any]]]:
        view = self._membership.view
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for change in () if view is None else view.changes.values():
            found.setdefault(change.operation, {})[change.shard] = self._progress_of(change)
        return found

    def _progress_of(self, change: Change) -> dict[str, Any]:
        reports = self._changes.reports.get(change.id, {}).values()
        copies = [copy for report in reports for copy in report.staged.values()]
        sealed = any(report.old is not None and report.old.seal for report in reports)
        state = "founded" if change.phase is Phase.FOUNDED else "sealed" if sealed else "copying"
        failed = [copy.error for copy in copies if copy.state is Staging.FAILED]
        return {
            "state": state,
            "done_bytes": sum(copy.done_bytes for copy in copies),
            "total_bytes": sum(copy.total_bytes for copy in copies),
            "error": failed[0] if failed else "",
        }

    def is_noted(self, change: Change) -> bool:
        """Whether its operation knows that this change was begun. It must not end before: a step
        that nobody knows of would be begun again, and a second rewind undoes what was written
        since the first."""
        stored = next(
            (s for s in self.stored(self._membership.require_view()) if s.id == change.operation),
            None,
        )
        if stored is None or stored.state not in ("running", "stopped"):
            return True
        return any(s.shard == change.shard and s.epoch == change.to_epoch for s in stored.steps)

    # -- keeping -------------------------------------------------------------------------------

    def stored(self, view: View) -> list[StoredOperation]:
        found = []
        for name, data in sorted(view.operations.items()):
            try:
                found.append(StoredOperation.decode(data))
            except msgspec.DecodeError as error:  # of a later version
                log.warning("operation %s cannot be read: %s", name, error)
        return found

    def _find(self, operation_id: str) -> StoredOperation:
        view = self._membership.require_view()
        for stored in self.stored(view):
            if stored.id == operation_id:
                return stored
        raise ops.unknown("operation", operation_id, view.operations)

    async def _keep(self, stored: StoredOperation) -> None:
        await self._propose(kv_put(OPERATION + stored.id, stored.encode()))

    async def _put_state(self, node: str, state: str) -> None:
        await self._propose(kv_put(NODE_STATE + node, state.encode()))

    async def _drop_state(self, node: str) -> None:
        await self._propose(kv_delete(NODE_STATE + node), may_be_gone=True)

    async def _propose(self, command: bytes, *, may_be_gone: bool = False) -> None:
        outcome: Outcome = await self._membership.propose(command)
        if not outcome.ok and not (may_be_gone and outcome.status == "not_found"):
            raise Conflict(f"The meta group refused: {outcome.message or outcome.status}.")
        await self._membership.tell_all()


def _nowhere(_url: str | None) -> str:
    raise Unavailable("This node is still starting.")


def stored_step(step: placement.Step, fresh: Sequence[str] = ()) -> StoredStep:
    return StoredStep(
        shard=step.shard,
        members=list(step.members),
        preferred=step.preferred_leader,
        reason=step.reason,
        fresh=list(fresh),
    )


def _is_reached(step: StoredStep, view: View) -> bool:
    """Whether the shard is as the step wants it. One that was begun has another epoch since."""
    info = view.map.shards[step.shard]
    if step.new_shard:
        return step.new_shard in view.map.shards
    if info.members != tuple(sorted(step.members)) or info.epoch < step.epoch:
        return False
    # One that keeps the members (a repair, a rewind) is reached by its epoch alone.
    return step.epoch > 0 or sorted(step.from_members) != sorted(step.members)


def _sizes(reports: dict[str, NodeReport]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for report in reports.values():
        for shard, size in report.bytes.items():
            sizes[shard] = max(sizes.get(shard, 0), size)
    return sizes


def _planned(step: StoredStep, view: View, sizes: dict[str, int]) -> ops.PlannedStep:
    old = set(view.map.shards[step.shard].members)
    if step.new_shard:
        copies = 2 * len(step.members)
    elif step.source:
        copies = len(step.members)
    else:
        copies = len(set(step.members) - (old - set(step.fresh)))
    return ops.PlannedStep(
        shard=step.shard,
        from_members=sorted(old),
        to_members=list(step.members),
        preferred_leader=step.preferred,
        reason=step.reason,
        bytes=copies * sizes.get(step.shard, 0),
        copies=copies,
    )
