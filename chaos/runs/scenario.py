"""A scenario: a workload, the faults that strike it, and the number of nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.registry import NEMESES
from agentmem_chaos.workloads.registry import WORKLOADS

SEPARATOR = "+"


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    description: str
    workload: str
    nemeses: tuple[str, ...]
    nodes: int = 3

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(NEMESES[name].needs for name in self.nemeses))


KILLS = ("kill-leader", "kill-follower", "kill-majority", "kill-all")
CUTS = (
    "partition-one",
    "partition-majority",
    "partition-ring",
    "partition-one-way",
    "partition-flapping",
)
WIRES = ("latency", "bandwidth", "cut-after-send", "peer-cut-after-send", "reset-peers")
MOVES = ("move-shard", "move-and-kill", "move-and-cut", "drain-node", "rebalance")
SPLITS = ("split-shard", "split-and-kill", "move-and-kill", "kill-leader")
GROWTH = ("join-node", "kill-leader", "partition-one")
DAMAGED = (
    "flip-journal",
    "truncate-journal",
    "truncate-lmdb",
    "flip-index",
    "truncate-index",
    "flip-snapshot",
    "truncate-snapshot",
)

NAMED: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("calm", "no faults: the workload alone", "mixed", ()),
        Scenario("kills", "processes die at once", "mixed", KILLS),
        Scenario("pauses", "a leader hangs and comes back", "register", ("pause-leader",)),
        Scenario("partitions", "nodes cannot hear each other", "register", CUTS),
        Scenario("wires", "slow, narrow and broken connections", "mixed", WIRES),
        Scenario(
            "retries", "answers are lost, writes are repeated", "counter", ("cut-after-send",)
        ),
        Scenario("clocks", "wall clocks jump", "mixed", ("clock-jump",)),
        Scenario(
            "disks",
            "syncs and writes fail, a disk fills up",
            "mixed",
            (
                "fsync-errors",
                "write-errors",
                "full-disk",
            ),
        ),
        Scenario("damage", "files of a stopped node are damaged", "mixed", DAMAGED),
        Scenario("rot", "bits of stored records flip", "mixed", ("flip-lmdb",)),
        *(
            [
                Scenario(
                    "moves",
                    "shards move while nodes die",
                    "mixed",
                    (*MOVES, "kill-leader", "kill-follower"),
                    nodes=4,
                )
            ]
            if set(MOVES) <= set(NEMESES)
            else []
        ),
        *(
            [Scenario("splits", "shards are split while nodes die", "mixed", SPLITS, nodes=4)]
            if set(SPLITS) <= set(NEMESES)
            else []
        ),
        *(
            [Scenario("joins", "nodes join and are given shards", "mixed", GROWTH)]
            if set(GROWTH) <= set(NEMESES)
            else []
        ),
        Scenario("upgrade", "every node is restarted in turn", "mixed", ("rolling-restart",)),
        Scenario(
            "smoke",
            "one of each kind that needs no rights",
            "mixed",
            (
                "kill-leader",
                "partition-one",
                "cut-after-send",
            ),
        ),
        Scenario("five", "kills and cuts among five nodes", "mixed", (*KILLS, *CUTS), nodes=5),
        Scenario(
            "everything",
            "all of these, in turn",
            "mixed",
            (
                *KILLS,
                "pause-leader",
                "rolling-restart",
                *CUTS,
                *WIRES,
                "clock-jump",
                "fsync-errors",
                "write-errors",
                "full-disk",
                *DAMAGED,
                "flip-lmdb",
                *MOVES,
                "split-shard",
                "split-and-kill",
            ),
            nodes=4,
        ),
    )
}


def find(text: str) -> Scenario:
    """A named scenario, or WORKLOAD+NEMESIS+NEMESIS... Raises ChaosError."""
    if text in NAMED:
        return NAMED[text]
    workload, *nemeses = text.split(SEPARATOR)
    if workload not in WORKLOADS:
        raise ChaosError(
            f"There is no scenario or workload {workload!r}. Scenarios: {_names(NAMED)}. Or "
            f"combine WORKLOAD+NEMESIS+...; workloads: {_names(WORKLOADS)}."
        )
    for name in nemeses:
        if name not in NEMESES:
            raise ChaosError(f"There is no nemesis {name!r}. Nemeses: {_names(NEMESES)}.")
    return Scenario(text, "combined on the command line", workload, tuple(nemeses))


def _names(table: Iterable[str]) -> str:
    return ", ".join(table)
