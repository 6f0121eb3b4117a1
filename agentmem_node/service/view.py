"""What a node knows of its cluster: plain data, as it travels between nodes and is kept on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import msgpack

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.meta import LEVEL_OF_CHANGES, MetaState, NodeInfo
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.providers.base import ModelIdentity

log = logging.getLogger("agentmem.membership")

FILE_NAME = "cluster-view.msgpack"
# What reading a view can raise that was damaged, or comes from another version.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, AgentMemError)
# Keys of the meta group's small settings that every node follows.
NODE_STATE = "node/"
OPERATION = "operation/"
ROOTS = "shards/roots"


@dataclass(frozen=True, slots=True)
class MetaGroup:
    """Who decides what the cluster is. Epoch 1 are its founders."""

    epoch: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class View:
    """`revision`: how far the meta group's log was read; a higher one is newer. 0: an older version
    says it, and only what it understands. `states`: of nodes that are not just active ("draining",
    "removed"). `operations`: what operators, or the cluster itself, have begun, as the meta group
    keeps it.
    """

    cluster_id: str
    model: ModelIdentity
    nodes: dict[str, NodeInfo]
    map: ShardMap
    revision: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    operations: dict[str, bytes] = field(default_factory=dict)
    meta: MetaGroup | None = None
    # Shards before any was split (0: none was), by which parts of requests are named for ever.
    roots: int = 0

    @classmethod
    def of(cls, state: MetaState, revision: int, meta: MetaGroup) -> View | None:
        """None while the cluster is not founded."""
        settings = state.settings
        if settings is None or state.map is None:
            return None
        return cls(
            settings.cluster_id,
            ModelIdentity(settings.model_name, settings.model_dim, settings.model_hash),
            dict(state.nodes),
            state.map,
            revision,
            dict(state.changes),
            {
                key.removeprefix(NODE_STATE): value.decode()
                for key, value in state.kv.items()
                if key.startswith(NODE_STATE)
            },
            {
                key.removeprefix(OPERATION): value
                for key, value in state.kv.items()
                if key.startswith(OPERATION)
            },
            meta,
            int(state.kv.get(ROOTS, b"0")),
        )

    def is_newer_than(self, known: View | None) -> bool:
        """Not what is known already, nor what a voter says that has slept or just started."""
        if known is None:
            return True
        if self.map.version < known.map.version:
            return False
        if not self.is_from_older and self.revision < known.revision:
            return False
        return self.to_wire() != known.to_wire()

    @property
    def is_from_older(self) -> bool:
        return self.revision == 0

    @property
    def needs_level(self) -> int:
        """What a node must understand to be part of this cluster."""
        moved = bool(self.changes) or (self.meta is not None and self.meta.epoch > 1)
        moved |= any(shard.epoch > 1 for shard in self.map.shards.values())
        return LEVEL_OF_CHANGES if moved else 1

    def to_wire(self) -> dict[str, Any]:
        return {
            "cluster_id": self.cluster_id,
            "model": [self.model.name, self.model.dim, self.model.model_hash],
            "nodes": {name: info.to_wire() for name, info in self.nodes.items()},
            "map": self.map.to_wire(),
            "revision": self.revision,
            "changes": [change.to_wire() for change in self.changes.values()],
            "states": self.states,
            "operations": self.operations,
            "meta": None if self.meta is None else [self.meta.epoch, list(self.meta.members)],
            "roots": self.roots,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> View:
        """Raises ValueError, KeyError, TypeError. What older versions did not say is defaulted."""
        name, dim, model_hash = wire["model"]
        changes = [Change.from_wire(row) for row in wire.get("changes", [])]
        meta = wire.get("meta")
        return cls(
            str(wire["cluster_id"]),
            ModelIdentity(name, dim, model_hash),
            {str(name): NodeInfo.from_wire(info) for name, info in wire["nodes"].items()},
            ShardMap.from_wire(wire["map"]),
            int(wire.get("revision", 0)),
            {change.shard: change for change in changes},
            {str(node): str(state) for node, state in wire.get("states", {}).items()},
            {str(key): bytes(value) for key, value in wire.get("operations", {}).items()},
            None if meta is None else MetaGroup(int(meta[0]), tuple(meta[1])),
            int(wire.get("roots", 0)),
        )


def load_view(disk: Disk) -> tuple[View, tuple[str, ...]] | None:
    """What was seen last, and the founding voters; None when there is none that can be read."""
    if not disk.exists(FILE_NAME):
        return None
    file = disk.open(FILE_NAME)
    try:
        wire = msgpack.unpackb(file.pread(file.size(), 0))
        return View.from_wire(wire), tuple(wire["voters"])
    # A damaged copy is no loss: the meta group has the original.
    except (*UNREADABLE, OSError) as error:
        log.warning("cannot read the kept shard map (%s); asking the cluster", error)
        return None
    finally:
        file.close()


def save_view(disk: Disk, view: View, founders: tuple[str, ...]) -> None:
    """Keep it for the next start. That it cannot be kept is logged: the cluster has it."""
    try:
        failpoint("view.before_write")
        file = disk.open(FILE_NAME + ".new", create=True)
        try:
            data: bytes = msgpack.packb(view.to_wire() | {"voters": founders})
            file.truncate(0)
            file.pwrite(data, 0)
            file.datasync()
        finally:
            file.close()
        failpoint("view.after_write")
        disk.rename(FILE_NAME + ".new", FILE_NAME)
        failpoint("view.after_rename")
        disk.sync_dir("")
    except OSError as error:
        log.warning("cannot keep a copy of the shard map: %s", error)
