"""One replica group on one node: the pieces put together, without any I/O.

Inputs change state and leave frames in the gate; `tick` does what time or earlier inputs made
due. Nothing here waits, sleeps or touches a file.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from typing import Any

from agentmem_cluster.errors import AgentMemError, NoQuorum, NotLeader, Overloaded, ShuttingDown
from agentmem_cluster.raft import readindex
from agentmem_cluster.raft.api import Applied, GroupSpec, GroupStatus, StateMachine
from agentmem_cluster.raft.applying import Applier, check_continues
from agentmem_cluster.raft.frames import HEAD, NO_INDEX, Kind
from agentmem_cluster.raft.gate import Gate
from agentmem_cluster.raft.matching import Refused, reconcile
from agentmem_cluster.raft.prevote import PreVote, hears_leader, log_is_as_good
from agentmem_cluster.raft.proposals import Proposals, not_leader
from agentmem_cluster.raft.pysync import Member
from agentmem_cluster.raft.replication import Replication
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.runtime import Clock, Rng

# A commit index that moved is told to followers with the next append, or after this long.
NOTICE_S = 0.002
NEVER = float("inf")


class Group:
    def __init__(
        self,
        node_id: str,
        spec: GroupSpec,
        machine: StateMachine,
        log: Any,
        clock: Clock,
        rng: Rng,
        settings: RaftSettings,
        gate: Gate,
        boot: bytes,
        tell: Callable[[Callable[[Any], None], Any], None],
    ) -> None:
        check_continues(log, machine, spec.id)
        self.spec = spec
        self.machine = machine
        self.log = log
        self._node_id = node_id
        self._peers = tuple(m for m in spec.members if m != node_id)
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._gate = gate
        self._boot = boot
        self._tell = tell
        self.member = Member(
            node_id,
            spec.members,
            log,
            machine.applied_index,
            settings,
            clock,
            rng,
            say=self._member_says,
            mark=gate.mark,
        )
        self._up: dict[str, bytes] = {}  # peer: its boot, as far as it has shown it
        self._reads = readindex.ReadIndex(len(spec.members), 2 * settings.heartbeat_s)
        self._proposals = Proposals(spec.id, settings)
        self._applier = Applier(log, machine, settings, clock.monotonic())
        self._prevote = PreVote(len(spec.members))
        self._leading: Replication | None = None
        self._leading_term = -1
        self._known_leader: tuple[str | None, int] = (None, 0)
        self._heard_s = float("-inf")  # the leader, last
        self._voters: set[str] = set()
        self._voted_term = -1
        self._by_hand_over = False
        self._asker_boot = b""
        self._quiet = False
        self._beat_s = 0.0
        self._notice_s = NEVER
        self._count = False  # the leader has a reason to count replicas again
        self._durable = log.durable_index
        self._floor = 0
        self._transfer: tuple[str, float] | None = None
        self.needs_reseed = False
        self.disk_full: AgentMemError | None = None
        if not self._peers:
            self.member.postpone_election(float("-inf"))  # nobody else could lead

    # -- inputs from this node --

    def propose(self, command: bytes, done: Callable[[Applied | AgentMemError], None]) -> None:
        if not command:
            raise ValueError("a command has at least one byte: the empty one is Raft's own no-op")
        refusal: AgentMemError | None
        if not self.member.is_leader:
            refusal = not_leader(self.spec.id, self.member.leader)
        elif self._transfer is not None:
            refusal = NotLeader(f"group {self.spec.id} is being handed over to another node")
        else:
            refusal = self.disk_full or self._proposals.refusal(command)
        if refusal is not None:
            self._tell(done, refusal)
        else:
            self._proposals.add(command, done)

    def read_index(self, done: Callable[[int | AgentMemError], None]) -> None:
        if self._reads_full(done):
            return
        self._reads.join(
            readindex.Local(
                done=lambda index: self._tell(done, index),
                failed=lambda: self._tell(done, self._no_quorum()),
                expires_s=self._clock.monotonic() + self._settings.election_s_max,
            )
        )

    def when_applied(self, index: int, done: Callable[[int | AgentMemError], None]) -> None:
        if self._reads_full(done):
            return
        gone = ShuttingDown(f"group {self.spec.id} is no longer served here")
        self._reads.join_applied(
            index,
            readindex.Local(
                done=lambda at: self._tell(done, at),
                failed=lambda: self._tell(done, gone),
                expires_s=NEVER,
            ),
        )

    def _reads_full(self, done: Callable[[Any], None]) -> bool:
        waiting = len(self._reads)
        if waiting < self._settings.queue_reads_max:
            return False
        self._tell(done, Overloaded(f"{waiting} reads of group {self.spec.id} wait already"))
        return True

    def read_now(self) -> int | None:
        """The read index, if this node alone is a quorum that may confirm it at once."""
        member = self.member
        if self._peers or not member.is_leader or member.commit_index < member.noop_index:
            return None
        applied = self._applier.applied_index
        return applied if applied == member.commit_index else None

    def transfer(self, to: str | None) -> None:
        """Hand the leadership over as soon as the follower has everything; nothing new until then."""
        if self._leading is None or self._transfer is not None:
            return
        able = self._leading.able(to)
        if able is not None:
            self._transfer = (able, self._clock.monotonic() + self._settings.transfer_s_max)

    def synced(self) -> bool:
        """A flush has ended. True when it covered entries of this group."""
        moved, self._durable = self._durable != self.log.durable_index, self.log.durable_index
        self._count = self._count or moved
        return moved

    def abandon(self) -> None:
        """The group leaves this node."""
        error = ShuttingDown(f"group {self.spec.id} is no longer served here")
        for done, told in self._proposals.abandon(error):
            self._tell(done, told)
        self._reads.fail_all()

    # -- inputs from peers --

    def peer_up(self, peer: str) -> None:
        if peer in self._peers:
            self._up[peer] = b""
            self.member.connected(peer)
            if self._leading is not None:
                self._leading.connected(peer)

    def peer_down(self, peer: str) -> None:
        if self._up.pop(peer, None) is not None:
            self.member.disconnected(peer)
            if self._leading is not None:
                self._leading.disconnected(peer)

    def receive(self, peer: str, frame: list[Any]) -> bool:
        """A well-formed frame of this group and epoch. False: it is a stranger's."""
        if peer not in self._peers:
            return False
        kind, term = frame[0], frame[4]
        handled = _HANDLERS[kind](self, peer, term, frame)
        self._follow_role()
        return handled

    def _on_append(self, peer: str, term: int, frame: list[Any]) -> bool:
        member = self.member
        if term < member.term:
            self._promise(peer, Kind.TERM_IS_OLD)
            return True
        if term == member.term and member.is_leader:
            return False
        previous, previous_term, commit, self._floor, terms, commands = frame[HEAD:]
        self._heard_s = self._clock.monotonic()
        self._prevote.close()
        verdict = reconcile(self.log, member.commit_index, previous, previous_term, terms, commands)
        boot = frame[3]
        message = {
            "type": "append_entries",
            "term": term,
            "commit_index": 0,
            "entries": [],
            "prevLogIdx": member.commit_index,
            "prevLogTerm": self.log.term_at(member.commit_index),
        }
        self._quiet = True
        if isinstance(verdict, Refused):
            member.receive(peer, message)
            self._quiet = False
            self._promise(peer, Kind.REFUSED, boot, verdict.previous, verdict.next_index)
            return True
        self.needs_reseed = False
        if verdict.truncate_from is not None:
            self.log.truncate_from(verdict.truncate_from)
            self._gate.mark()
        message["entries"] = verdict.fresh
        message["prevLogIdx"] = verdict.previous
        message["prevLogTerm"] = self.log.term_at(verdict.previous)
        # Never further than what this very leader has verified (D1, D10).
        message["commit_index"] = min(commit, verdict.verified)
        member.receive(peer, message)
        self._quiet = False
        if verdict.verified <= self.log.durable_index and self.log.hard_state_durable:
            self._say(peer, Kind.APPENDED, boot, verdict.verified)
        else:
            if not commands and self.log.hard_state_durable:
                # A heartbeat is answered while a slow disk works: this member is alive.
                self._say(peer, Kind.APPENDED, boot, min(verdict.verified, self.log.durable_index))
            self._promise(peer, Kind.APPENDED, boot, verdict.verified)
        return True

    def _on_appended(self, peer: str, term: int, frame: list[Any]) -> bool:
        if not self._is_to_me(term, frame) or self._leading is None:
            return False
        if not self._leading.appended(peer, frame[6]):
            return False
        self._count = True
        self.member.receive(
            peer,
            {
                "type": "next_node_idx",
                "reset": False,
                "success": True,
                "next_node_idx": frame[6] + 1,
            },
        )
        return True

    def _on_refused(self, peer: str, term: int, frame: list[Any]) -> bool:
        if not self._is_to_me(term, frame) or self._leading is None:
            return False
        self._leading.refused(peer, frame[6], frame[7])
        self.member.receive(
            peer,
            {"type": "next_node_idx", "reset": False, "success": False, "next_node_idx": 1},
        )
        return True

    def _on_ask_vote(self, peer: str, term: int, frame: list[Any]) -> bool:
        last_index, last_term, by_hand_over = frame[HEAD:]
        if term < self.member.term:
            self._promise(peer, Kind.TERM_IS_OLD)
            return True
        if not by_hand_over and self._content():
            return True
        self._asker_boot = frame[3]
        self.member.receive(
            peer,
            {
                "type": "request_vote",
                "term": term,
                "last_log_index": last_index,
                "last_log_term": last_term,
            },
        )
        return True

    def _on_vote(self, peer: str, term: int, frame: list[Any]) -> bool:
        if not self._is_to_me(term, frame):
            return False
        if self._voted_term != term:
            self._voted_term = term
            self._voters.clear()
        if peer not in self._voters:  # pysyncobj would count it twice (D12)
            self._voters.add(peer)
            self.member.receive(peer, {"type": "response_vote", "term": term})
        return True

    def _on_take_over(self, peer: str, term: int, _: list[Any]) -> bool:
        self.member.receive(peer, {"type": "timeout_now", "term": term})
        return True

    def _on_ask_prevote(self, peer: str, term: int, frame: list[Any]) -> bool:
        round_, last_index, last_term = frame[HEAD:]
        log = self.log
        granted = (
            term >= self.member.term
            and not self._content()
            and log_is_as_good(last_term, last_index, log.term_at(log.last_index), log.last_index)
        )
        if term < self.member.term:
            self._promise(peer, Kind.TERM_IS_OLD)
        self._say(peer, Kind.PREVOTE, frame[3], round_, granted)
        return True

    def _on_prevote(self, peer: str, term: int, frame: list[Any]) -> bool:
        if frame[5] != self._boot:
            return False
        if frame[7] and not self.member.is_leader and self._prevote.grant(peer, frame[6]):
            self.member.campaign()
        return True

    def _on_probe(self, peer: str, term: int, frame: list[Any]) -> bool:
        if term < self.member.term:
            self._promise(peer, Kind.TERM_IS_OLD)
        elif term == self.member.term and self.member.leader == peer:
            self._say(peer, Kind.PROBED, frame[3], frame[5])
        return True

    def _on_probed(self, peer: str, term: int, frame: list[Any]) -> bool:
        if not self._is_to_me(term, frame) or self._leading is None:
            return False
        self._answer_reads(self._reads.probed(peer, frame[6]))
        return True

    def _on_ask_read(self, peer: str, _: int, frame: list[Any]) -> bool:
        if self._leading is None:
            self._say(peer, Kind.READ_AT, frame[3], frame[5], NO_INDEX)
        else:
            self._reads.join_remote(readindex.Remote(peer, frame[3], frame[5]))
        return True

    def _on_read_at(self, _: str, term: int, frame: list[Any]) -> bool:
        if frame[5] != self._boot:
            return False
        self._reads.answered(frame[6], frame[7])
        return True

    def _on_term_is_old(self, _: str, term: int, frame: list[Any]) -> bool:
        self.member.observe_term(term)
        return True

    def _on_reseed(self, peer: str, term: int, frame: list[Any]) -> bool:
        if term == self.member.term and peer == self.member.leader:
            self.needs_reseed = self.log.last_index + 1 < frame[5]
        return True

    def _is_to_me(self, term: int, frame: list[Any]) -> bool:
        """An answer to this life of this node, and to this very term (D12)."""
        if frame[5] != self._boot:
            return False
        if term > self.member.term:
            self.member.observe_term(term)
        return term == self.member.term

    def _content(self) -> bool:
        return self.member.is_leader or hears_leader(
            self.member.leader,
            self._heard_s,
            self._clock.monotonic(),
            self._settings.election_s_min,
        )

    # -- time --

    def tick(self, now_s: float) -> bool:
        """Do what is due. True when there is more to do at once."""
        member = self.member
        if not member.is_leader:
            self._tick_follower(now_s)
        if member.is_leader:
            self._tick_leader(now_s)
        more = self._apply()
        self._tick_reads(now_s)
        return more or self._proposals.queued

    def _tick_follower(self, now_s: float) -> None:
        member = self.member
        if self._proposals.queued:
            for done, refusal in self._proposals.refuse_queued(member.leader):
                self._tell(done, refusal)
        if member.taking_over:
            self._by_hand_over = True
            member.campaign()
            self._by_hand_over = False
        elif member.election_deadline <= now_s:
            if not self._peers:
                member.campaign()
            else:
                self._ask_prevotes()
        self._follow_role()

    def _ask_prevotes(self) -> None:
        settings, log = self._settings, self.log
        spread_s = settings.election_s_max - settings.election_s_min
        self.member.postpone_election(settings.election_s_min + spread_s * self._rng.random())
        self.member.forget_leader()
        round_ = self._prevote.begin()
        for peer in self._up:
            self._say(peer, Kind.ASK_PREVOTE, round_, log.last_index, log.term_at(log.last_index))

    def _tick_leader(self, now_s: float) -> None:
        member = self.member
        beat = now_s >= self._beat_s
        if self._count or beat:
            self._count = False
            member.tick()  # counts replicas, and steps down without a quorum
            self._follow_role()
            if self._leading is None:
                return
        leading = self._leading
        assert leading is not None
        if self._proposals.queued:
            self.log.append(self._proposals.enter(self.log.last_index + 1, member.term))
            self._gate.mark()
        leading.commit_index = member.commit_index
        leading.feed()
        if not leading.untold():
            self._notice_s = NEVER
        elif now_s >= self._notice_s:
            leading.notice()
            self._notice_s = NEVER
        else:
            self._notice_s = min(self._notice_s, now_s + NOTICE_S)
        if beat:
            heartbeat_s = self._settings.heartbeat_s
            # The same moments for all groups of a node: one wake-up, one burst to each peer.
            self._beat_s = (floor(now_s / heartbeat_s + 1e-6) + 1) * heartbeat_s
            for peer in leading.beat():
                self._say(peer, Kind.RESEED, self.log.first_index)
        if self._transfer is not None:
            self._hand_over(now_s)

    def _hand_over(self, now_s: float) -> None:
        assert self._transfer is not None and self._leading is not None
        to, until_s = self._transfer
        if now_s >= until_s:
            self._transfer = None
        elif (
            to in self._up
            and not self._proposals.queued
            and self._leading.peers[to].match_index == self.log.last_index
            and self.member.hand_over(to)
        ):
            # Asked once. If that election fails, this leader goes on when the time is up.
            self._transfer = (self._node_id, until_s)

    def _apply(self) -> bool:
        entries, results = self._applier.step(self.member.commit_index)
        if not entries:
            return False
        self.member.applied(self._applier.applied_index)
        for done, outcome in self._proposals.applied(entries, results):
            self._tell(done, outcome)
        last = min(self.member.commit_index, self.log.durable_index)
        return bool(self._applier.applied_index < last)

    def _tick_reads(self, now_s: float) -> None:
        reads = self._reads
        if self._leading is not None:
            if reads.wants_round and self.member.commit_index >= self.member.noop_index:
                round_, answers = reads.begin_round(self.member.commit_index)
                self._answer_reads(answers)
                for peer in self._up:
                    self._say(peer, Kind.PROBE, round_)
        elif self.member.leader in self._up:
            number = reads.begin_ask(now_s)
            if number is not None:
                assert self.member.leader is not None
                self._say(self.member.leader, Kind.ASK_READ, number)
        reads.applied(self._applier.applied_index)
        reads.expire(now_s)

    def next_wakeup(self) -> float:
        soonest = min(self._reads.next_wakeup(), self._applier.checkpoint_due_s())
        if self._leading is None:
            return min(soonest, self.member.election_deadline)
        if self._transfer is not None:
            soonest = min(soonest, self._transfer[1])
        return min(soonest, self._beat_s, self._notice_s)

    # -- checkpoints and compaction --

    def checkpoint(self, now_s: float) -> Any:
        return self._applier.checkpoint(now_s)

    def checkpointed(self, job: Any) -> bool:
        self._applier.checkpointed(job)
        return self._applier.compact(
            self._floor if self._leading is None else self._leading.floor()
        )

    # -- view --

    def status(self) -> GroupStatus:
        member, log = self.member, self.log
        return GroupStatus(
            id=self.spec.id,
            epoch=self.spec.epoch,
            members=self.spec.members,
            role=member.role,
            term=member.term,
            leader=member.leader,
            last_index=log.last_index,
            commit_index=member.commit_index,
            applied_index=self._applier.applied_index,
            durable_index=log.durable_index,
            first_index=log.first_index,
            match_index={} if self._leading is None else self._leading.match_index(),
            queued=len(self._proposals),
        )

    # -- inside --

    def _follow_role(self) -> None:
        """React when the last input changed who leads."""
        member = self.member
        known = (member.leader, member.term)
        if known != self._known_leader:
            self._known_leader = known
            self._reads.role_changed()
        if not member.is_leader:
            if self._leading is not None:
                self._leading = None
                self._transfer = None
        elif self._leading is None or self._leading_term != member.term:
            self._leading_term = member.term
            self._leading = Replication(self._peers, self.log, self._settings, self._send_append)
            for peer in self._up:
                self._leading.begin(peer)
            self._prevote.close()
            self._beat_s = self._clock.monotonic()
            self._count = True
            self.needs_reseed = False

    def _no_quorum(self) -> NoQuorum:
        return NoQuorum(
            f"no majority of {', '.join(self.spec.members)} answered for group {self.spec.id} "
            f"within {self._settings.election_s_max} s, so a read here might be stale",
            hint="Retry, or read with consistency=eventual.",
        )

    def _answer_reads(self, answers: list[readindex.Answer]) -> None:
        for to, index in answers:
            if to.peer in self._up and self._leading is not None:
                self._leading.commit_index = self.member.commit_index
                self._leading.notice(to.peer)  # or the follower would wait to learn it
                self._say(to.peer, Kind.READ_AT, to.boot, to.number, index)

    def _send_append(
        self, peer: str, previous: int, previous_term: int, terms: Any, commands: Any
    ) -> None:
        # What a leader says about entries is true without its own disk: it does not count
        # itself before its flush (Raft thesis 10.2.1).
        self._say(
            peer,
            Kind.APPEND,
            previous,
            previous_term,
            self.member.commit_index,
            self._leading.floor() if self._leading is not None else 0,
            terms,
            commands,
        )

    def _member_says(self, peer: str, message: dict[str, Any]) -> None:
        kind = message["type"]
        if peer not in self._up:
            return
        if kind == "request_vote":
            last_index, last_term = message["last_log_index"], message["last_log_term"]
            self._promise(peer, Kind.ASK_VOTE, last_index, last_term, self._by_hand_over)
        elif kind == "response_vote":
            self._promise(peer, Kind.VOTE, self._asker_boot)
        elif kind == "timeout_now":
            self._say(peer, Kind.TAKE_OVER)
        elif not (kind == "next_node_idx" and self._quiet):
            raise AssertionError(f"pysyncobj said {kind}, which nothing here makes it say")

    def _say(self, peer: str, kind: Kind, *fields: Any) -> None:
        self._gate.say(peer, self._frame(kind, fields))

    def _promise(self, peer: str, kind: Kind, *fields: Any) -> None:
        self._gate.promise(peer, self._frame(kind, fields))

    def _frame(self, kind: Kind, fields: tuple[Any, ...]) -> list[Any]:
        return [int(kind), self.spec.id, self.spec.epoch, self._boot, self.member.term, *fields]


_HANDLERS: dict[int, Callable[[Group, str, int, list[Any]], bool]] = {
    Kind.APPEND: Group._on_append,
    Kind.APPENDED: Group._on_appended,
    Kind.REFUSED: Group._on_refused,
    Kind.ASK_VOTE: Group._on_ask_vote,
    Kind.VOTE: Group._on_vote,
    Kind.TAKE_OVER: Group._on_take_over,
    Kind.ASK_PREVOTE: Group._on_ask_prevote,
    Kind.PREVOTE: Group._on_prevote,
    Kind.PROBE: Group._on_probe,
    Kind.PROBED: Group._on_probed,
    Kind.ASK_READ: Group._on_ask_read,
    Kind.READ_AT: Group._on_read_at,
    Kind.TERM_IS_OLD: Group._on_term_is_old,
    Kind.RESEED: Group._on_reseed,
}
