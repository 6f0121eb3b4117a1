"""The nemeses by name."""

from __future__ import annotations

from agentmem_chaos.nemeses.base import Nemesis
from agentmem_chaos.nemeses.damage import DAMAGES
from agentmem_chaos.nemeses.machine import ClockJump, FsyncErrors, FullDisk, WriteErrors
from agentmem_chaos.nemeses.membership import MEMBERSHIP, PATH
from agentmem_chaos.nemeses.network import (
    Flapping,
    PartitionMajority,
    PartitionOne,
    PartitionOneWay,
    PartitionRing,
)
from agentmem_chaos.nemeses.processes import (
    KillAll,
    KillFollower,
    KillLeader,
    KillMajority,
    Pause,
    RollingRestart,
)
from agentmem_chaos.nemeses.slow import (
    Bandwidth,
    CutAfterSend,
    Latency,
    PeerCutAfterSend,
    ResetPeers,
)
from agentmem_node.api.routes import ROUTES

_ALL: tuple[type[Nemesis], ...] = (
    KillLeader,
    KillFollower,
    KillMajority,
    KillAll,
    Pause,
    RollingRestart,
    PartitionOne,
    PartitionMajority,
    PartitionRing,
    PartitionOneWay,
    Flapping,
    Latency,
    Bandwidth,
    CutAfterSend,
    PeerCutAfterSend,
    ResetPeers,
    ClockJump,
    FsyncErrors,
    WriteErrors,
    FullDisk,
    *DAMAGES,
)


def _can_change_members() -> bool:
    """Whether the nodes of this version can be asked to move shards."""
    return any(route.path == PATH for route in ROUTES)


NEMESES: dict[str, type[Nemesis]] = {
    kind.name: kind for kind in (*_ALL, *(MEMBERSHIP if _can_change_members() else ()))
}
