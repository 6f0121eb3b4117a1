"""Who leads: when this member asks for an election, and whom it supports in one.

pysyncobj keeps terms and votes and counts them; this decides what reaches it. A member that
hears a live leader supports nobody else, and one that hears none asks a majority (PreVote)
before it raises the term. A hand-over skips both: the leader itself has asked for it. In a group
that was just founded nobody can be hearing a leader: one member, agreed on, asks without waiting.
"""

from __future__ import annotations

from typing import Any

from agentmem_cluster.raft.frames import HEAD, Kind
from agentmem_cluster.raft.prevote import PreVote, hears_leader, log_is_as_good
from agentmem_cluster.raft.pysync import Member, MemberLog
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.raft.voice import Voice
from agentmem_cluster.runtime import Clock, Rng


class Elections:
    """One member's part in the elections of its group."""

    def __init__(
        self,
        member: Member,
        log: MemberLog,
        voice: Voice,
        clock: Clock,
        rng: Rng,
        settings: RaftSettings,
        *,
        founding: tuple[int, int] | None,
    ) -> None:
        """`founding`: the index and term at which this member is the one to begin the group."""
        self._member = member
        self._log = log
        self._voice = voice
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._alone = not voice.peers
        self._prevote = PreVote(len(voice.peers) + 1)
        self._heard_s = float("-inf")
        self._voters: set[str] = set()
        self._voted_term = -1
        self._by_hand_over = False
        self._asker_boot = b""
        self._founding = founding
        if self._alone or self._is_founder:
            member.postpone_election(float("-inf"))  # nobody else could lead, or is to

    def heard_leader(self) -> None:
        """A leader of the present term, or of a later one, has spoken."""
        self._heard_s = self._clock.monotonic()
        self._prevote.close()

    def won(self) -> None:
        self._prevote.close()

    def tick(self, now_s: float) -> None:
        """What a member that does not lead does when time passes."""
        member = self._member
        if member.taking_over:
            self._by_hand_over = True
            member.campaign()
            self._by_hand_over = False
        elif member.election_deadline <= now_s:
            if self._alone:
                member.campaign()
            else:
                self._ask_prevotes()

    @property
    def _is_founder(self) -> bool:
        """Whether this member is the one to begin, and nothing has happened in the group yet."""
        return self._founding == (self._log.last_index, self._member.term)

    def peer_up(self) -> None:
        if self._is_founder:
            self._member.postpone_election(0.0)

    def _ask_prevotes(self) -> None:
        settings, log, voice = self._settings, self._log, self._voice
        if self._is_founder:
            # Soon again: the others may not serve the group yet. It stays the same round, for
            # the answers may be slower than that.
            self._member.postpone_election(settings.heartbeat_s)
            round_ = self._prevote.round if self._prevote.open else self._prevote.begin()
        else:
            spread_s = settings.election_s_max - settings.election_s_min
            self._member.postpone_election(settings.election_s_min + spread_s * self._rng.random())
            round_ = self._prevote.begin()
        self._member.forget_leader()
        last_term = log.term_at(log.last_index)
        for peer in voice.up:
            voice.say(peer, Kind.ASK_PREVOTE, round_, log.last_index, last_term)

    def on_ask_prevote(self, peer: str, frame: list[Any]) -> bool:
        term = frame[4]
        round_, last_index, last_term = frame[HEAD:]
        log = self._log
        own_last_term = log.term_at(log.last_index)
        granted = (
            term >= self._member.term
            and not self._is_content()
            and log_is_as_good(last_term, last_index, own_last_term, log.last_index)
        )
        if term < self._member.term:
            self._voice.promise(peer, Kind.TERM_IS_OLD)
        self._voice.say(peer, Kind.PREVOTE, frame[3], round_, granted)
        return True

    def on_prevote(self, peer: str, frame: list[Any]) -> bool:
        if frame[5] != self._voice.boot:
            return False
        granted = frame[7] and not self._member.is_leader
        if granted and self._prevote.grant(peer, frame[6]):
            self._member.campaign()
        return True

    def on_ask_vote(self, peer: str, frame: list[Any]) -> bool:
        term = frame[4]
        last_index, last_term, by_hand_over = frame[HEAD:]
        if term < self._member.term:
            self._voice.promise(peer, Kind.TERM_IS_OLD)
            return True
        if not by_hand_over and self._is_content():
            return True
        self._asker_boot = frame[3]
        self._member.receive(
            peer,
            {
                "type": "request_vote",
                "term": term,
                "last_log_index": last_index,
                "last_log_term": last_term,
            },
        )
        return True

    def on_vote(self, peer: str, frame: list[Any]) -> bool:
        if not self._voice.is_answer_to_me(frame):
            return False
        term = frame[4]
        if self._voted_term != term:
            self._voted_term = term
            self._voters.clear()
        if peer not in self._voters:  # pysyncobj would count it twice (D12)
            self._voters.add(peer)
            self._member.receive(peer, {"type": "response_vote", "term": term})
        return True

    def on_take_over(self, peer: str, frame: list[Any]) -> bool:
        self._member.receive(peer, {"type": "timeout_now", "term": frame[4]})
        return True

    def on_term_is_old(self, _: str, frame: list[Any]) -> bool:
        self._member.observe_term(frame[4])
        return True

    def speak(self, peer: str, message: dict[str, Any]) -> None:
        """What pysyncobj says about elections."""
        kind = message["type"]
        if kind == "request_vote":
            last_index, last_term = message["last_log_index"], message["last_log_term"]
            self._voice.promise(peer, Kind.ASK_VOTE, last_index, last_term, self._by_hand_over)
        elif kind == "response_vote":
            self._voice.promise(peer, Kind.VOTE, self._asker_boot)
        elif kind == "timeout_now":
            self._voice.say(peer, Kind.TAKE_OVER)
        else:
            raise AssertionError(f"pysyncobj said {kind}, which nothing here makes it say")

    def _is_content(self) -> bool:
        """A member with a live leader (itself perhaps) wants no election."""
        member = self._member
        return member.is_leader or hears_leader(
            member.leader, self._heard_s, self._clock.monotonic(), self._settings.election_s_min
        )
