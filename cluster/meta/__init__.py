"""The meta group: the replicated state that says what the cluster is."""

from agentmem_cluster.meta.checkpoint import MetaCheckpoint, MetaCorrupt
from agentmem_cluster.meta.commands import (
    Outcome,
    begin_change,
    change_voters,
    end_change,
    found_epoch,
    init_cluster,
    kv_delete,
    kv_put,
    put_node,
    redirect_change,
    remove_node,
    set_map,
)
from agentmem_cluster.meta.machine import MetaStateMachine
from agentmem_cluster.meta.state import (
    LEVEL,
    LEVEL_OF_CHANGES,
    LEVEL_OF_RESTORES,
    ClusterSettings,
    MetaState,
    NodeInfo,
)

__all__ = [
    "LEVEL",
    "LEVEL_OF_CHANGES",
    "LEVEL_OF_RESTORES",
    "ClusterSettings",
    "MetaCheckpoint",
    "MetaCorrupt",
    "MetaState",
    "MetaStateMachine",
    "NodeInfo",
    "Outcome",
    "begin_change",
    "change_voters",
    "end_change",
    "found_epoch",
    "init_cluster",
    "kv_delete",
    "kv_put",
    "put_node",
    "redirect_change",
    "remove_node",
    "set_map",
]
