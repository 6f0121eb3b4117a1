"""What a node says of itself. GET /cluster is for every tenant; what others stored is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config_keys import ApiKey
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.status import Status
from agentmem_node.service.view import View


def status_of(tenants: list[str], needs_reseed: bool = False) -> Status:
    view = View("c", ModelIdentity("none", 0, ""), {}, ShardMap.initial(["a"], 1, 1))
    raft = SimpleNamespace(
        term=1, commit_index=3, applied_index=3, leader="b", needs_reseed=needs_reseed
    )
    local = SimpleNamespace(
        group=SimpleNamespace(status=lambda: raft),
        shard=SimpleNamespace(count=lambda: 7, digest=lambda: b"\1"),
    )
    config = SimpleNamespace(
        node=SimpleNamespace(id="a"),
        cluster=SimpleNamespace(name="c", nodes={}),
        security=SimpleNamespace(api_keys=[ApiKey(tenant=tenant) for tenant in tenants]),
    )
    routing = SimpleNamespace(
        local={"s00": local}, leader_of=lambda _: "a", is_connected=lambda _: True
    )
    membership = SimpleNamespace(require_view=lambda: view, meta_status=lambda: None, view=view)
    host = SimpleNamespace(groups={"s00": local.group})
    parts: list[Any] = [config, routing, membership, host, None, None]
    return Status(*parts)


def shard_of(tenants: list[str]) -> dict[str, Any]:
    return cast("dict[str, Any]", status_of(tenants).cluster_view()["shards"]["s00"])


def test_a_replica_that_cannot_catch_up_is_named_and_the_node_still_serves() -> None:
    assert status_of([]).ready() == (True, {})
    assert status_of([], needs_reseed=True).ready() == (True, {"replica_needs_reseed": ["s00"]})


@pytest.mark.parametrize("tenants", [[], ["one"], ["one", "one"]], ids=len)
def test_a_cluster_of_one_tenant_tells_how_many_memories_a_shard_has(tenants: list[str]) -> None:
    assert shard_of(tenants)["memories"] == 7


def test_a_cluster_of_several_tenants_tells_none_of_them() -> None:
    shard = shard_of(["one", "two"])
    assert "memories" not in shard
    assert shard["commit_index"] == 3
