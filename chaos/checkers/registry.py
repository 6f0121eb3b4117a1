"""The checkers by name, and which of them look at every run."""

from __future__ import annotations

from collections.abc import Iterable

from agentmem_chaos.checkers import answers, cluster, linearizable, memories
from agentmem_chaos.checkers.base import Checker, Evidence, Finding

OF_WORKLOADS: dict[str, Checker] = {
    linearizable.NAME: linearizable.linearizable,
    memories.MEMORIES: memories.memories,
    memories.SEARCH: memories.search,
    memories.ONCE: memories.exactly_once,
}
OF_EVERY_RUN: dict[str, Checker] = {
    cluster.DIGESTS: cluster.digests,
    cluster.EPOCHS: cluster.one_epoch,
    cluster.REPLICAS: cluster.replicas,
    answers.MINORITY: answers.minority,
    answers.IN_TIME: answers.in_time,
    answers.ERRORS: answers.errors,
    cluster.CRASHES: cluster.crashes,
    cluster.DAMAGE: cluster.damage,
    cluster.CONVERGES: cluster.converges,
}
CLAIMS: dict[str, str] = {
    linearizable.NAME: linearizable.CLAIM,
    memories.MEMORIES: memories.MEMORIES_CLAIM,
    memories.SEARCH: memories.SEARCH_CLAIM,
    memories.ONCE: memories.ONCE_CLAIM,
    cluster.DIGESTS: cluster.DIGESTS_CLAIM,
    cluster.EPOCHS: cluster.EPOCHS_CLAIM,
    cluster.REPLICAS: cluster.REPLICAS_CLAIM,
    answers.MINORITY: answers.MINORITY_CLAIM,
    answers.IN_TIME: "every call ends within its deadline",
    answers.ERRORS: answers.ERRORS_CLAIM,
    cluster.CRASHES: cluster.CRASHES_CLAIM,
    cluster.DAMAGE: cluster.DAMAGE_CLAIM,
    cluster.CONVERGES: "after healing, every node is ready within the limit",
}


def check_all(evidence: Evidence, of_workload: Iterable[str]) -> list[Finding]:
    chosen = [OF_WORKLOADS[name] for name in of_workload]
    return [checker(evidence) for checker in (*chosen, *OF_EVERY_RUN.values())]
