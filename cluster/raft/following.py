"""A follower's side of replication: appends are matched, written and acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmem_cluster.raft.frames import HEAD, Kind
from agentmem_cluster.raft.matching import Refused, reconcile
from agentmem_cluster.raft.pysync import Member
from agentmem_cluster.raft.voice import Voice
from agentmem_cluster.runtime import Clock


class Following:
    """What one member does with the appends of whoever leads."""

    def __init__(
        self,
        member: Member,
        log: Any,
        voice: Voice,
        heard_leader: Callable[[], None],
        clock: Clock,
        quiet_s: float,
    ) -> None:
        self._member = member
        self._log = log
        self._voice = voice
        self._heard_leader = heard_leader
        self.receiving = False  # what pysyncobj acknowledges meanwhile is said here, not there
        self.floor = 0  # what every connected follower has, by the leader's word
        self.needs_reseed = False
        self._refused: tuple[int, int] | None = None  # the last append: of which term, after what
        self._clock = clock
        self._quiet_s = quiet_s
        # What was acknowledged last (to which leadership, up to where), and when.
        self._told: tuple[bytes, int, int] | None = None
        self._told_s = 0.0

    def session_ended(self) -> None:
        """What was on its way to the leader may be lost."""
        self._told = None

    def on_append(self, peer: str, frame: list[Any]) -> bool:
        member, log, voice = self._member, self._log, self._voice
        boot, term = frame[3], frame[4]
        if term < member.term:
            voice.promise(peer, Kind.TERM_IS_OLD)
            return True
        if term == member.term and member.is_leader:
            return False  # two leaders of one term: certainly not this frame
        previous, previous_term, commit, floor, terms, commands = frame[HEAD:]
        self._heard_leader()
        verdict = reconcile(log, member.commit_index, previous, previous_term, terms, commands)
        if isinstance(verdict, Refused):
            self._told = None
            self._refused = term, verdict.previous
            self._pass_on(peer, term, member.commit_index, [], 0)
            voice.promise(peer, Kind.REFUSED, boot, verdict.previous, verdict.next_index)
            return True
        self.floor = floor
        self.needs_reseed = False
        self._refused = None
        if verdict.truncate_from is not None:
            log.truncate_from(verdict.truncate_from)
            voice.mark()
        # Committed only as far as this very leader has verified (D1, D10).
        self._pass_on(peer, term, verdict.previous, verdict.fresh, min(commit, verdict.verified))
        self._acknowledge(peer, boot, verdict.verified, is_beat=not commands)
        return True

    def _pass_on(
        self, peer: str, term: int, previous: int, fresh: list[tuple[bytes, int, int]], commit: int
    ) -> None:
        self.receiving = True
        try:
            self._member.receive(
                peer,
                {
                    "type": "append_entries",
                    "term": term,
                    "commit_index": commit,
                    "entries": fresh,
                    "prevLogIdx": previous,
                    "prevLogTerm": self._log.term_at(previous),
                },
            )
        finally:
            self.receiving = False

    def _acknowledge(self, peer: str, boot: bytes, verified: int, *, is_beat: bool) -> None:
        log, voice = self._log, self._voice
        now_s, telling = self._clock.monotonic(), (boot, self._member.term, verified)
        if is_beat and telling == self._told and now_s - self._told_s < self._quiet_s:
            return  # a notice of commit: the leader knows already, and that this member lives
        self._told, self._told_s = telling, now_s
        durable = log.durable_index if log.hard_state_durable else -1
        if verified <= durable:
            voice.say(peer, Kind.APPENDED, boot, verified)
            return
        if is_beat and durable >= 0:
            # A beat is answered while a slow disk works, for this member is alive.
            voice.say(peer, Kind.APPENDED, boot, durable)
        voice.promise(peer, Kind.APPENDED, boot, verified)

    def on_reseed(self, peer: str, frame: list[Any]) -> bool:
        """The leader's log begins at `frame[5]`, and what it sent last was not of use here.

        Either this log ends before that, or it goes on with entries of a leader that was deposed:
        those that it has instead are compacted.
        """
        first_index = frame[5]
        if frame[4] == self._member.term and peer == self._member.leader:
            ends_before = self._log.last_index + 1 < first_index
            conflicts = self._refused == (self._member.term, first_index - 1)
            self.needs_reseed = ends_before or conflicts
        return True
