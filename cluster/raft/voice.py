"""How a member addresses its peers: every frame stamped, every promise held for its flush."""

from __future__ import annotations

from typing import Any

from agentmem_cluster.raft.api import GroupSpec
from agentmem_cluster.raft.frames import Kind
from agentmem_cluster.raft.gate import Gate
from agentmem_cluster.raft.pysync import Member


class Voice:
    """One group's way to the gate. Peers that are not connected are not spoken to."""

    def __init__(self, spec: GroupSpec, node_id: str, boot: bytes, gate: Gate) -> None:
        self.peers = tuple(member for member in spec.members if member != node_id)
        self.up: dict[str, None] = {}
        self.boot = boot
        self._spec = spec
        self._gate = gate
        self.member: Member  # set by the group: the member speaks through this very voice

    def say(self, peer: str, kind: Kind, *fields: Any) -> None:
        """What is true whatever happens to this node's disk."""
        if peer in self.up:
            self._gate.say(peer, self._frame(kind, fields))

    def promise(self, peer: str, kind: Kind, *fields: Any) -> None:
        """What is true only once everything written so far is on disk."""
        if peer in self.up:
            self._gate.promise(peer, self._frame(kind, fields))

    def mark(self) -> None:
        """Something was written that no flush covers yet."""
        self._gate.mark()

    def _frame(self, kind: Kind, fields: tuple[Any, ...]) -> list[Any]:
        spec = self._spec
        return [int(kind), spec.id, spec.epoch, self.boot, self.member.term, *fields]

    def is_answer_to_me(self, frame: list[Any]) -> bool:
        """Whether an answer is to this life of the node *and* to its present term (D12)."""
        term: int = frame[4]
        if frame[5] != self.boot:
            return False
        if term > self.member.term:
            self.member.observe_term(term)
        return term == self.member.term
