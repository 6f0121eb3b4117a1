"""What a client sees of a node: proposals and reads, over the real core's own interface."""

from __future__ import annotations

from collections.abc import Callable

from agentmem_chaos.sim.audit import Auditor
from agentmem_chaos.sim.clients import Seen, Written
from agentmem_chaos.sim.judge import Judge
from agentmem_chaos.sim.machine import Command
from agentmem_chaos.sim.node import SimNode
from agentmem_cluster.epochs.commands import Sealed
from agentmem_cluster.errors import AgentMemError, Unavailable, WrongShard
from agentmem_cluster.raft.api import Applied


class Serving:
    """Implements `clients.Server` for one node."""

    def __init__(
        self, node: SimNode, judge: Judge, auditor: Auditor, *, confirms_reads: bool
    ) -> None:
        self.name = node.name
        self._node = node
        self._judge = judge
        self._auditor = auditor
        self._confirms_reads = confirms_reads

    def members_of(self, group: str, key: str) -> tuple[str, ...]:
        return self._node.members_of(self._node.shard_of(group, key))

    def propose(
        self, group: str, command: Command, answer: Callable[[Written | AgentMemError, bool], None]
    ) -> None:
        node = self._node
        if not node.alive:
            answer(Unavailable("connection refused"), True)
            return

        def run() -> None:
            shard = node.shard_of(group, command.key)
            refusal = node.refusal(shard)
            if refusal is not None:
                answer(refusal, True)
                return
            at_once = True
            encoded = node.encode(shard, command)
            spec = node.groups[shard]

            def done(outcome: Applied | AgentMemError) -> None:
                if isinstance(outcome, Applied) and isinstance(outcome.result, Sealed):
                    # It came between two epochs, and was certainly not done.
                    answer(WrongShard(f"{shard} is between two epochs"), True)
                    return
                if isinstance(outcome, AgentMemError):
                    answer(outcome, at_once)
                    return
                self._judge.acknowledged_write(self.name, shard, encoded, outcome)
                node.acknowledged(spec, outcome.index)
                if node.groups.get(shard) == spec:
                    self._auditor.committed(spec, outcome.index, outcome.term)
                answer(Written(outcome.result, outcome.index, shard), at_once)

            node.run(lambda core: core.propose(shard, encoded, done))
            at_once = False
            node.plan_turn()

        node.in_process(node.boot_number, run)

    def read(self, group: str, key: str, answer: Callable[[Seen | AgentMemError], None]) -> None:
        self._read(lambda: self._node.shard_of(group, key), key, answer)

    def read_shard(
        self, shard: str, key: str, answer: Callable[[Seen | AgentMemError], None]
    ) -> None:
        """Of the replica of a shard, whatever key it is."""
        self._read(lambda: shard, key, answer)

    def _read(
        self,
        shard_of: Callable[[], str],
        key: str,
        answer: Callable[[Seen | AgentMemError], None],
    ) -> None:
        node = self._node
        if not node.alive:
            answer(Unavailable("connection refused"))
            return

        def run() -> None:
            shard = shard_of()
            if shard not in node.groups:
                answer(WrongShard(f"{shard} is not on {self.name}", hint="Refresh the shard map."))
                return
            machine = node.machines[shard]
            if not self._confirms_reads:
                answer(Seen(machine.read(key), machine.applied_index, shard))
                return

            def done(outcome: int | AgentMemError) -> None:
                if isinstance(outcome, AgentMemError):
                    answer(outcome)
                    return
                applied = node.applied_index(shard)
                if applied < outcome:
                    self._judge.accuse("reads wait", f"{self.name} {shard}: {applied} < {outcome}")
                answer(Seen(machine.read(key), machine.applied_index, shard))

            node.run(lambda core: core.read_index(shard, done))
            node.plan_turn()

        node.in_process(node.boot_number, run)
