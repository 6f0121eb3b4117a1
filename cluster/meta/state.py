"""What the meta group knows: which cluster this is, its nodes, its shard map, small settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.commands import EpochState
from agentmem_cluster.meta.reading import read_fields
from agentmem_cluster.shardmap import ShardMap

# The highest level of commands and formats that this program knows, and what needs which.
LEVEL: Final = 2
LEVEL_OF_CHANGES: Final = 2
LEVEL_OF_RESTORES: Final = 2  # a log that revives memories


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What is decided once, when a cluster is founded."""

    cluster_id: str
    name: str
    model_name: str
    model_dim: int
    model_hash: str
    created_ms: int

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Any) -> ClusterSettings:
        """Raises ValueError. Keys of later versions are ignored."""
        return cls(**read_fields(cls, wire))


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Where a node is reached: `peer` HOST:PORT of its link, `http` the URL of its API.

    `incarnation` names its disk ("" in versions that had none), `zone` where it stands, `level`
    what it understands: the highest level of commands and formats.
    """

    peer: str
    http: str
    version: str
    incarnation: str = ""
    zone: str = ""
    level: int = 1

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Any) -> NodeInfo:
        """Raises ValueError. Keys of later versions are ignored, those that came later default."""
        return cls(**read_fields(cls, wire))


@dataclass(slots=True)
class MetaState:
    settings: ClusterSettings | None = None
    map: ShardMap | None = None
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    kv: dict[str, bytes] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)  # by shard: one at a time
    epoch: EpochState = field(default_factory=EpochState)  # of the meta group itself
    # Who votes in that epoch (none named: the founders), and who will in the next.
    voters: tuple[str, ...] = ()
    next_voters: tuple[str, ...] = ()

    @property
    def level(self) -> int:
        """What all nodes understand: nothing newer may be written where others read it."""
        return min((info.level for info in self.nodes.values()), default=1)

    @property
    def needs_level(self) -> int:
        """What a node must understand to follow this state: below it, it would go wrong."""
        moved = self.epoch.epoch > 1 or bool(self.voters or self.next_voters or self.changes)
        if self.map is not None:
            moved |= any(shard.epoch > 1 for shard in self.map.shards.values())
        return LEVEL_OF_CHANGES if moved else 1

    def to_wire(self) -> dict[str, Any]:
        return {
            # Whose program wrote it: one of a lower level leaves out what it does not understand.
            "level": LEVEL,
            "settings": None if self.settings is None else self.settings.to_wire(),
            "map": None if self.map is None else self.map.to_wire(),
            "nodes": {name: info.to_wire() for name, info in sorted(self.nodes.items())},
            "kv": dict(sorted(self.kv.items())),
            "changes": [change.to_wire() for _, change in sorted(self.changes.items())],
            "epoch": list(self.epoch),
            "voters": list(self.voters),
            "next_voters": list(self.next_voters),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> MetaState:
        """Raises ValueError or KeyError. What the version before did not write is defaulted."""
        changes = [Change.from_wire(row) for row in wire.get("changes", [])]
        settings, shard_map = wire["settings"], wire["map"]
        return cls(
            None if settings is None else ClusterSettings.from_wire(settings),
            None if shard_map is None else ShardMap.from_wire(shard_map),
            {str(name): NodeInfo.from_wire(info) for name, info in wire["nodes"].items()},
            {str(key): bytes(value) for key, value in wire["kv"].items()},
            {change.shard: change for change in changes},
            EpochState(*wire.get("epoch", EpochState())),
            tuple(wire.get("voters", ())),
            tuple(wire.get("next_voters", ())),
        )
