"""Leaders go home: a shard is led by the node that the map prefers, when all is quiet."""

from __future__ import annotations

import asyncio
import logging

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.runtime import Clock
from agentmem_node.service.membership import Membership
from agentmem_node.service.routing import Routing

log = logging.getLogger("agentmem.balance")

_LOOK_S = 0.5
# A leader moves home only when nothing happened for a while: after a crash the returning node
# first catches up and the cluster first calms down.
_QUIET_S = 3.0
_LAG_MAX = 64
_TRANSFER_S = 2.0


async def balance_leaders(
    node_id: str, membership: Membership, routing: Routing, clock: Clock
) -> None:
    """Runs for ever: one hand-over at a time."""
    last_trouble_s = clock.monotonic()
    while True:
        await asyncio.sleep(_LOOK_S)
        if membership.view is None:
            continue
        now_s = clock.monotonic()
        if not all(routing.is_connected(node) for node in membership.nodes):
            last_trouble_s = now_s
        if now_s - last_trouble_s < _QUIET_S:
            continue
        for shard_id, local in list(routing.local.items()):
            home = local.info.preferred_leader
            if not local.group.is_leader or home == node_id or not local.machine.accepts:
                continue
            status = local.group.status()
            if status.last_index - status.match_index.get(home, 0) > _LAG_MAX:
                continue
            try:
                # It may still load its model, be about to stop, or have a damaged replica.
                await membership.ask(home, "shard.may_lead", {"shard": shard_id})
                await local.group.transfer(home, deadline=now_s + _TRANSFER_S)
                log.info("gave the leadership of %s to %s", shard_id, home)
                break
            except AgentMemError as error:
                log.info("%s keeps the leadership of %s: %s", node_id, shard_id, error)
