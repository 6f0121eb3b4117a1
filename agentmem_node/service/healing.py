"""What the cluster mends by itself: lost nodes, lost disks, replicas too far behind, stray seals.

Only the leader of the meta group looks. What it finds becomes an operation like an operator's,
with the same steps, one at a time, and never of a shard that lacks a live majority.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from agentmem_cluster import placement
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.meta import LEVEL_OF_CHANGES
from agentmem_cluster.nodestate import has_quorum
from agentmem_cluster.runtime import Clock
from agentmem_node.model import operations as ops
from agentmem_node.service.membership import Membership
from agentmem_node.service.operations import Operations, stored_step
from agentmem_node.service.stored_operations import StoredStep
from agentmem_node.service.survey import NodeReport, Survey
from agentmem_node.service.view import View

log = logging.getLogger("agentmem.healing")

_LOOK_S: Final = 1.0
# Something must look wrong this long: a node that starts, or a change that ends, looks so too.
_PATIENCE_S: Final = 3.0


class Healing:
    def __init__(
        self,
        membership: Membership,
        operations: Operations,
        survey: Survey,
        clock: Clock,
        replication: int,
        lost_after_s: float,
    ) -> None:
        self._membership = membership
        self._operations = operations
        self._survey = survey
        self._clock = clock
        self._replication = replication
        self._lost_after_s = lost_after_s
        self._away_since: dict[str, float] = {}
        self._wrong_since: dict[tuple[str, int, str], float] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._membership.leads:
                # Who comes to lead begins to count anew: it cannot know how long others waited.
                self._away_since.clear()
                self._wrong_since.clear()
                continue
            try:
                await self._look()
            except AgentMemError as error:
                log.info("healing: %s; trying again", error)
            except Exception:
                log.exception("healing stumbled; trying again")

    async def _look(self) -> None:
        view = self._membership.require_view()
        if any(info.level < LEVEL_OF_CHANGES for info in view.nodes.values()):
            return
        now_s = self._clock.monotonic()
        self._count_lost(view, now_s)
        reports = await self._survey.take(view)
        steps = self._steps(view, reports, now_s)
        running = any(
            one.by == "cluster" and one.state == "running" for one in self._operations.stored(view)
        )
        if steps and not running:
            log.warning("healing: %s", "; ".join(f"{s.shard}: {s.reason}" for s in steps))
            await self._operations.store_new(ops.OperationWish(kind="heal"), steps, "cluster")
            self._wrong_since.clear()

    def _count_lost(self, view: View, now_s: float) -> None:
        # A voter is missed even when it has no replica.
        voters = () if view.meta is None else view.meta.members
        for node in {*view.map.nodes(), *voters}:
            if self._membership.is_connected(node):
                self._away_since.pop(node, None)
            else:
                self._away_since.setdefault(node, now_s)
        self._membership.lost = frozenset(
            node
            for node, since_s in self._away_since.items()
            if now_s - since_s >= self._lost_after_s
        )

    def _steps(self, view: View, reports: dict[str, NodeReport], now_s: float) -> list[StoredStep]:
        nodes = self._operations.node_states(view, set(reports))
        steps = {
            step.shard: stored_step(step)
            for step in placement.plan_lost(view.map, nodes, self._replication)
        }
        wrong: dict[tuple[str, int, str], str] = {}
        for shard, info in view.map.shards.items():
            if shard in view.changes or shard in steps or not has_quorum(info.members, nodes):
                continue
            fresh, lame, whole, reason = self._useless(view, shard, reports)
            if reason:
                wrong[shard, info.epoch, reason] = reason
                since_s = self._wrong_since.setdefault((shard, info.epoch, reason), now_s)
                voting = len(info.members) - len(lame)
                if now_s - since_s >= _PATIENCE_S and whole and 2 * voting > len(info.members):
                    steps[shard] = StoredStep(
                        shard=shard,
                        members=list(info.members),
                        preferred=info.preferred_leader,
                        reason=reason,
                        fresh=fresh,
                    )
        self._wrong_since = {key: s for key, s in self._wrong_since.items() if key in wrong}
        return list(steps.values())

    def _useless(
        self, view: View, shard: str, reports: dict[str, NodeReport]
    ) -> tuple[list[str], list[str], list[str], str]:
        """Members whose replica must be copied anew; those of them that cannot confirm the seal
        either; those to copy from; and why the shard needs another epoch."""
        info = view.map.shards[shard]
        fresh: list[str] = []
        lame: list[str] = []
        whole: list[str] = []
        reasons: list[str] = []
        sealed = False
        for member in info.members:
            report = reports.get(member)
            if report is None or shard in report.copying:
                continue
            mine = [r for r in report.replicas if r.shard == shard and r.epoch == info.epoch]
            if not mine:
                fresh.append(member)
                lame.append(member)
                reasons.append(f"{member} has lost its replica")
            elif mine[0].is_damaged:
                fresh.append(member)  # its journal is not, so that it votes and keeps entries
                reasons.append(f"the replica of {member} is damaged")
            elif mine[0].needs_reseed:
                fresh.append(member)
                lame.append(member)
                reasons.append(f"{member} is too far behind")
            else:
                whole.append(member)
                sealed |= mine[0].is_sealed
        if sealed and not reasons:
            reasons.append("its epoch was sealed and no other founded")
        return fresh, lame, whole, ", ".join(reasons)
