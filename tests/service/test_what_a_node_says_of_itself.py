"""What a node says of itself. GET /cluster is for every tenant; what others stored is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentmem_cluster.meta import NodeInfo
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config_keys import ApiKey
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.status import Status
from agentmem_node.service.view import View


def status_of(
    tenants: list[str], needs_reseed: bool = False, damaged: str = "", has_replica: bool = True
) -> Status:
    nodes = {
        name: NodeInfo(f"{name}:1", f"http://{name}", "1", zone=f"zone of {name}")
        for name in ("a", "b", "c")
    }
    states = {"b": "draining", "c": "removed"}
    shard_map = ShardMap.initial(["a"], 1, 1)
    view = View("c", ModelIdentity("none", 0, ""), nodes, shard_map, states=states)
    raft = SimpleNamespace(
        term=1, commit_index=3, applied_index=3, leader="b", needs_reseed=needs_reseed
    )
    local = SimpleNamespace(
        group=SimpleNamespace(status=lambda: raft),
        shard=SimpleNamespace(count=lambda: 7, digest=lambda: b"\1", applied_index=2),
    )
    config = SimpleNamespace(
        node=SimpleNamespace(id="a"),
        cluster=SimpleNamespace(name="c", nodes={}),
        security=SimpleNamespace(api_keys=[ApiKey(tenant=tenant) for tenant in tenants]),
    )
    routing = SimpleNamespace(
        local={"s00": local}, leader_of=lambda _: "a", is_connected=lambda _: True
    )
    membership = SimpleNamespace(
        require_view=lambda: view, meta_status=lambda: None, view=view, is_admitted=True
    )
    host = SimpleNamespace(groups={"s00": local.group})
    if not has_replica:
        routing.local.clear()
        host.groups.clear()
    replicas = SimpleNamespace(damaged={damaged: "a row"} if damaged else {})
    parts: list[Any] = [config, routing, membership, replicas, host, None, None]
    return Status(*parts)


def shard_of(tenants: list[str]) -> dict[str, Any]:
    return cast("dict[str, Any]", status_of(tenants).cluster_view()["shards"]["s00"])


def test_a_replica_that_cannot_catch_up_is_named_and_the_node_still_serves() -> None:
    assert status_of([]).ready() == (True, {})
    assert status_of([], needs_reseed=True).ready() == (True, {"replica_needs_reseed": ["s00"]})
    assert status_of([], damaged="s00").ready() == (True, {"replica_damaged": ["s00"]})
    assert status_of([], has_replica=False).ready() == (True, {"replica_missing": ["s00"]})


def test_every_node_is_told_with_its_state_and_zone_until_it_was_removed() -> None:
    nodes = status_of([]).cluster_view()["nodes"]
    assert {name: (told["state"], told["zone"]) for name, told in nodes.items()} == {
        "a": ("active", "zone of a"),
        "b": ("draining", "zone of b"),  # without a replica, and still there
    }


def test_a_digest_comes_with_the_entry_that_it_belongs_to() -> None:
    shard = shard_of([])
    assert (shard["digest"], shard["digest_index"]) == ("01", 2)


@pytest.mark.parametrize("tenants", [[], ["one"], ["one", "one"]], ids=len)
def test_a_cluster_of_one_tenant_tells_how_many_memories_a_shard_has(tenants: list[str]) -> None:
    assert shard_of(tenants)["memories"] == 7


def test_a_cluster_of_several_tenants_tells_none_of_them() -> None:
    shard = shard_of(["one", "two"])
    assert "memories" not in shard
    assert shard["commit_index"] == 3
