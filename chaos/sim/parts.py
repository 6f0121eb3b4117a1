"""What a world is made of. The harness's own tests replace a part by one with a bug in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.machine import Divisible, MachineStore, Observer, RegisterMachine
from agentmem_chaos.sim.plan import WorldPlan
from agentmem_chaos.sim.shard_machine import ShardMachine
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.core import NodeCore
from agentmem_cluster.raft.settings import RaftSettings

JOURNAL_PATH = "journal"


def open_journal(disk: SimDisk, plan: WorldPlan) -> Journal:
    return Journal.open(disk, JOURNAL_PATH, segment_bytes=plan.segment_bytes)


@dataclass(frozen=True, slots=True)
class Parts:
    open_journal: Callable[[SimDisk, WorldPlan], Journal] = open_journal
    make_core: Callable[..., NodeCore] = NodeCore
    make_machine: Callable[[MachineStore, Observer], RegisterMachine] = RegisterMachine
    make_shard: Callable[[ShardStore, Observer], Divisible] = ShardMachine
    syncs_before_it_speaks: bool = True
    confirms_reads: bool = True


def settings(plan: WorldPlan) -> RaftSettings:
    """Small enough for a minute: checkpoints and compaction must happen while things break."""
    return RaftSettings(
        checkpoint_entries=plan.checkpoint_entries,
        checkpoint_s=plan.checkpoint_s,
        tail_bytes=plan.tail_bytes,
        append_bytes_max=plan.append_bytes_max,
        inflight_appends_max=plan.inflight_appends_max,
        queue_commands_max=plan.queue_commands_max,
    )
