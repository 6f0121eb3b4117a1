"""What must hold of a group on a node after every turn, read off its status: cheap, so always.

Raft's own (Ongaro and Ousterhout 2014, figure 3): a committed entry is the same on every node,
and every later leader has it. And what the layers around it promise each other: nothing is
applied before it is committed and synced, and the log keeps what a power loss would need.
"""

from __future__ import annotations

from typing import NamedTuple

from agentmem_chaos.sim.judge import Judge
from agentmem_cluster.journal.group import GroupLog
from agentmem_cluster.raft.api import GroupStatus


class _Committed(NamedTuple):
    at: int
    term: int  # of the entry
    by_term: int  # in which a node knew it to be committed
    node: str


class Invariants:
    """Of all groups of a world."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        # By group and epoch: an epoch's log has entries after its seal, the next one's others.
        self._terms: dict[tuple[str, int, int], tuple[int, str]] = {}  # of committed entries
        self._latest: dict[tuple[str, int], _Committed] = {}
        self._before: dict[tuple[str, str, int, int], GroupStatus] = {}
        self.checks = 0

    def turned(
        self, node: str, boot: int, status: GroupStatus, log: GroupLog, durable_index: int
    ) -> None:
        """`durable_index`: what the state machine's files would keep through a power loss."""
        self.checks += 1
        where = (node, status.id, status.epoch, boot)
        before = self._before.get(where)
        self._before[where] = status
        what = _fault(status, before, durable_index)
        if what is not None:
            self._judge.accuse("order of indexes", f"{node} {status.id}: {what}\n{status}")
        if before is None or status.commit_index != before.commit_index:
            self._committed(node, status, log)

    def _committed(self, node: str, status: GroupStatus, log: GroupLog) -> None:
        index = status.commit_index
        if not log.first_index - 1 <= index <= log.last_index or index == 0:
            return
        term = log.term_at(index)
        known, first = self._terms.setdefault((status.id, status.epoch, index), (term, node))
        if known != term:
            self._judge.accuse(
                "state machine safety",
                f"{first} has committed {status.id}/{index} of term {known}, {node} of term {term}",
            )
        latest = self._latest.get((status.id, status.epoch))
        if latest is None or index > latest.at:
            self._latest[status.id, status.epoch] = _Committed(index, term, status.term, node)

    def elected(self, node: str, status: GroupStatus, log: GroupLog) -> None:
        """A leader has all that was committed before its term."""
        latest = self._latest.get((status.id, status.epoch))
        if latest is None or latest.by_term >= status.term or latest.at < log.first_index - 1:
            return
        if latest.at > log.last_index or log.term_at(latest.at) != latest.term:
            self._judge.accuse(
                "leader completeness",
                f"{node} leads {status.id} in term {status.term} without {latest.at} of term "
                f"{latest.term}, which {latest.node} committed in term {latest.by_term}",
            )


def _fault(status: GroupStatus, before: GroupStatus | None, durable_index: int) -> str | None:
    if not status.applied_index <= status.commit_index <= status.last_index:
        return "applied, committed and written entries are not in this order"
    if status.applied_index > status.durable_index:
        return "an entry is applied that this node has not synced"
    if status.first_index - 1 > durable_index:
        return (
            f"the log begins after what the state machine keeps through a power loss, which ends "
            f"at {durable_index}"
        )
    if before is None:
        return None
    if status.term < before.term:
        return f"the term went back, from {before.term}"
    if status.commit_index < before.commit_index or status.applied_index < before.applied_index:
        return "what is committed or applied went back"
    return None
