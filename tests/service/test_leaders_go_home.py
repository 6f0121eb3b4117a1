"""Leaderships go to the nodes that the map prefers, one at a time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentmem_cluster.errors import BadRequest, ShuttingDown
from agentmem_cluster.realtime import RealClock
from agentmem_node.service import balance
from agentmem_node.service.membership import Membership
from agentmem_node.service.routing import Routing


class Group:
    """Led by this node until it is given away."""

    def __init__(self) -> None:
        self.leader = "n1"

    @property
    def is_leader(self) -> bool:
        return self.leader == "n1"

    def status(self) -> Any:
        return SimpleNamespace(last_index=9, match_index={"n2": 9, "n3": 9})

    async def transfer(self, to: str, *, deadline: float) -> None:
        self.leader = to


@pytest.mark.parametrize("refusal", [ShuttingDown("leaving"), BadRequest("of an older version")])
def test_a_home_that_cannot_have_its_shard_keeps_no_other_shard_from_going_home(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "_QUIET_S", 0.0)
    groups = {"s00": Group(), "s01": Group()}
    homes = {"s00": "n2", "s01": "n3"}

    async def ask(node: str, method: str, body: object) -> None:
        assert method == "shard.may_lead"
        if node == "n2":
            raise refusal

    local = {
        shard: SimpleNamespace(
            info=SimpleNamespace(preferred_leader=homes[shard]),
            group=group,
            machine=SimpleNamespace(accepts=True),
        )
        for shard, group in groups.items()
    }
    membership = cast("Membership", SimpleNamespace(view=object(), nodes=["n1", "n2"], ask=ask))
    routing = cast("Routing", SimpleNamespace(local=local, is_connected=lambda node: True))

    async def story() -> None:
        balancing = asyncio.create_task(
            balance.balance_leaders("n1", membership, routing, RealClock())
        )
        try:
            async with asyncio.timeout(10.0):
                while groups["s01"].leader != "n3":
                    await asyncio.sleep(0.01)
        finally:
            balancing.cancel()
            await asyncio.gather(balancing, return_exceptions=True)

    asyncio.run(story())
    assert groups["s00"].leader == "n1"
