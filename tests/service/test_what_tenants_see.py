"""GET /cluster is for every tenant; what others have stored is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config_keys import ApiKey
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.membership import View
from agentmem_node.service.status import Status


def shard_of(tenants: list[str]) -> dict[str, Any]:
    view = View("c", ModelIdentity("none", 0, ""), {}, ShardMap.initial(["a"], 1, 1))
    raft = SimpleNamespace(term=1, commit_index=3, applied_index=3)
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
    membership = SimpleNamespace(require_view=lambda: view, meta_status=lambda: None)
    parts: list[Any] = [config, routing, membership, None, None, None]
    status = Status(*parts)
    return cast("dict[str, Any]", status.cluster_view()["shards"]["s00"])


@pytest.mark.parametrize("tenants", [[], ["one"], ["one", "one"]], ids=len)
def test_a_cluster_of_one_tenant_tells_how_many_memories_a_shard_has(tenants: list[str]) -> None:
    assert shard_of(tenants)["memories"] == 7


def test_a_cluster_of_several_tenants_tells_none_of_them() -> None:
    shard = shard_of(["one", "two"])
    assert "memories" not in shard
    assert shard["commit_index"] == 3
