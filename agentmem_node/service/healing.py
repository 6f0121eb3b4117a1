"""What the cluster mends by itself: lost nodes, lost disks, replicas too far behind, stray seals.

Only the leader of the meta group looks. What it finds becomes an operation like an operator's,
with the same steps, one at a time, and never of a shard that lacks a live majority.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from agentmem_cluster import placement
from agentmem_cluster.epochs.suspicions import Subject, Suspicions
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.meta import LEVEL_OF_CHANGES
from agentmem_cluster.nodestate import has_quorum
from agentmem_cluster.runtime import Clock
from agentmem_cluster.shardmap import ShardInfo
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
        self._suspicions = Suspicions(_PATIENCE_S)

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._membership.leads:
                # Who comes to lead begins to count anew: it cannot know how long others waited.
                self._away_since.clear()
                self._suspicions.clear()
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
            self._suspicions.clear()

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
        for shard, info in view.map.shards.items():
            if shard in view.changes or shard in steps or not has_quorum(info.members, nodes):
                continue
            found = self._look_at(info, reports, now_s)
            # One of several that is not certain yet may be on its way back: all of it can wait.
            if not found.reasons or not found.is_certain:
                continue
            voting = len(info.members) - len(found.lame)
            if found.whole and 2 * voting > len(info.members):
                steps[shard] = StoredStep(
                    shard=shard,
                    members=list(info.members),
                    preferred=info.preferred_leader,
                    reason=", ".join(found.reasons),
                    fresh=found.fresh,
                )
        self._suspicions.keep(
            lambda one: (
                one.shard not in view.changes
                and one.shard in view.map.shards
                and view.map.shards[one.shard].epoch == one.epoch
            )
        )
        return list(steps.values())

    def _look_at(self, info: ShardInfo, reports: dict[str, NodeReport], now_s: float) -> _Found:
        found = _Found()
        sealed = False
        for member in info.members:
            report = reports.get(member)
            if report is None or info.id in report.copying:
                continue
            mine = [r for r in report.replicas if r.shard == info.id and r.epoch == info.epoch]
            is_lame = True
            if not mine:
                wrong = f"{member} has lost its replica"
            elif mine[0].is_damaged:
                wrong = f"the replica of {member} is damaged"
                is_lame = False  # its journal is not, so that it votes and keeps entries
            elif mine[0].needs_reseed:
                wrong = f"{member} is too far behind"
            else:
                wrong = ""
                found.whole.append(member)
                sealed |= mine[0].is_sealed
            subject = Subject(info.id, info.epoch, member)
            self._suspicions.saw(subject, wrong, now_s)
            if wrong:
                found.fresh.append(member)
                found.lame.extend([member] if is_lame else [])
                found.reasons.append(wrong)
                found.is_certain &= self._suspicions.is_certain(subject, now_s)
        if sealed and not found.reasons:
            subject = Subject(info.id, info.epoch, "")
            found.reasons.append("its epoch was sealed and no other founded")
            self._suspicions.saw(subject, found.reasons[0], now_s)
            found.is_certain = self._suspicions.is_certain(subject, now_s)
        return found


@dataclass(slots=True)
class _Found:
    """Of one shard: members whose replica must be copied anew; those of them that cannot confirm
    a seal either; those to copy from; why it needs another epoch, and whether that is certain."""

    fresh: list[str] = field(default_factory=list)
    lame: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    is_certain: bool = True
