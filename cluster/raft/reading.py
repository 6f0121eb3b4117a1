"""One group's linearizable reads, said and heard: `ReadIndex` decides, this speaks to the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmem_cluster.errors import AgentMemError, NoQuorum, Overloaded, ShuttingDown
from agentmem_cluster.raft.applying import Applier
from agentmem_cluster.raft.frames import NO_INDEX, Kind
from agentmem_cluster.raft.pysync import Member
from agentmem_cluster.raft.readindex import Answer, Local, ReadIndex, Remote
from agentmem_cluster.raft.replication import Replication
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.raft.voice import Voice
from agentmem_cluster.runtime import Clock

NEVER = float("inf")
Done = Callable[[int | AgentMemError], None]
Tell = Callable[[Callable[[Any], None], Any], None]


class Reading:
    """The reads of one member, whatever its role is."""

    def __init__(
        self,
        group_id: str,
        member: Member,
        voice: Voice,
        applier: Applier,
        clock: Clock,
        settings: RaftSettings,
        tell: Tell,
        *,
        inherited: int,
    ) -> None:
        self._group_id = group_id
        self._member = member
        self._voice = voice
        self._applier = applier
        self._clock = clock
        self._settings = settings
        self._tell = tell
        # The last entry that an earlier life of this node may have acknowledged.
        self._inherited = inherited
        self._index = ReadIndex(len(voice.peers) + 1, 2 * settings.heartbeat_s)
        self.leading: Replication | None = None  # while this member leads

    # -- questions of this node --

    def ask(self, done: Done, until_s: float) -> None:
        if not self._is_full(done):
            self._index.join(
                Local(
                    done=lambda index: self._tell(done, index),
                    failed=lambda: self._tell(done, self._no_quorum()),
                    expires_s=self._clock.monotonic() + self._settings.election_s_max,
                    until_s=until_s,
                )
            )

    def wait_applied(self, index: int, done: Done, until_s: float) -> None:
        if not self._is_full(done):
            gone = ShuttingDown(f"group {self._group_id} is no longer served here")
            self._index.join_applied(
                index,
                Local(
                    done=lambda at: self._tell(done, at),
                    failed=lambda: self._tell(done, gone),
                    expires_s=NEVER,
                    until_s=until_s,
                ),
            )

    def at_once(self) -> int | None:
        """The read index, if this node alone is a quorum that may confirm it at once."""
        member = self._member
        if self._voice.peers or not member.is_leader or member.commit_index < member.noop_index:
            return None
        applied = self._applier.applied_index
        if self._applier.stalled is not None and applied >= self._inherited:
            return applied  # what a full disk holds up was never acknowledged, nor seen
        return applied if applied == member.commit_index else None

    # -- frames of peers --

    def on_probe(self, peer: str, frame: list[Any]) -> bool:
        if frame[4] < self._member.term:
            self._voice.promise(peer, Kind.TERM_IS_OLD)
        elif frame[4] == self._member.term and self._member.leader == peer:
            self._voice.say(peer, Kind.PROBED, frame[3], frame[5])
        return True

    def on_probed(self, peer: str, frame: list[Any]) -> bool:
        if not self._voice.is_answer_to_me(frame) or self.leading is None:
            return False
        self._answer(self._index.probed(peer, frame[6]))
        return True

    def on_ask_read(self, peer: str, frame: list[Any]) -> bool:
        if self.leading is None:
            self._voice.say(peer, Kind.READ_AT, frame[3], frame[5], NO_INDEX)
        else:
            self._index.join_remote(Remote(peer, frame[3], frame[5]))
        return True

    def on_read_at(self, _: str, frame: list[Any]) -> bool:
        if frame[5] != self._voice.boot:
            return False
        self._index.answered(frame[6], frame[7])
        return True

    # -- time and roles --

    def serve(self, now_s: float) -> None:
        """Begin the round or the question that is due, and tell whom it can be told."""
        index, member = self._index, self._member
        if self.leading is not None:
            if index.wants_round and member.commit_index >= member.noop_index:
                self._answer(index.begin_round(member.commit_index))
                self.probe()
        elif member.leader is not None and member.leader in self._voice.up:
            number = index.begin_ask(now_s)
            if number is not None:
                self._voice.say(member.leader, Kind.ASK_READ, number)
        index.applied(self._applier.applied_index)
        index.expire(now_s)

    def probe(self) -> None:
        """Ask whether this member still leads; again with each beat, for sessions break."""
        round_ = self._index.open_round
        if round_ is not None:
            for peer in self._voice.up:
                self._voice.say(peer, Kind.PROBE, round_)

    def role_changed(self) -> None:
        self._index.role_changed()

    def next_wakeup(self) -> float:
        return self._index.next_wakeup()

    def fail_all(self) -> None:
        self._index.fail_all()

    # -- inside --

    def _answer(self, answers: list[Answer]) -> None:
        if self.leading is None:
            return
        for to, index in answers:
            self.leading.commit_index = self._member.commit_index
            self.leading.notice(to.peer)  # or the follower would wait to learn it
            self._voice.say(to.peer, Kind.READ_AT, to.boot, to.number, index)

    def _is_full(self, done: Done) -> bool:
        waiting = len(self._index)
        if waiting < self._settings.queue_reads_max:
            return False
        self._tell(done, Overloaded(f"{waiting} reads of group {self._group_id} wait already"))
        return True

    def _no_quorum(self) -> NoQuorum:
        peers = ", ".join(self._voice.peers)
        return NoQuorum(
            f"no majority of this node and {peers} answered for group {self._group_id} within "
            f"{self._settings.election_s_max} s, so a read here might be stale",
            hint="Retry, or read with consistency=eventual.",
        )
