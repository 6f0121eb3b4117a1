"""One replica group on one node: the pieces put together, without any I/O.

Inputs change state and leave frames in the gate; `tick` does what time or earlier inputs made
due. Nothing here waits, sleeps or touches a file.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from typing import Any

from agentmem_cluster.errors import AgentMemError, NotLeader, ShuttingDown
from agentmem_cluster.raft.api import Applied, GroupSpec, GroupStatus, StateMachine
from agentmem_cluster.raft.applying import Applier, check_continues
from agentmem_cluster.raft.elections import Elections
from agentmem_cluster.raft.following import Following
from agentmem_cluster.raft.frames import Kind
from agentmem_cluster.raft.gate import Gate
from agentmem_cluster.raft.proposals import Proposals, not_leader
from agentmem_cluster.raft.pysync import Member
from agentmem_cluster.raft.reading import Reading
from agentmem_cluster.raft.replication import Replication
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.raft.voice import Voice
from agentmem_cluster.runtime import Clock, Rng

# A commit index that moved is told to followers with the next append, or at the next multiple of
# this: the same moments for all groups, so that one wake-up serves those that have something.
NOTICE_S = 0.005
NEVER = float("inf")
Tell = Callable[[Callable[[Any], None], Any], None]


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
        tell: Tell,
    ) -> None:
        check_continues(log, machine, spec.id)
        self.spec = spec
        self.log = log
        self._node_id = node_id
        self._clock = clock
        self._settings = settings
        self._tell = tell
        self._voice = Voice(spec, node_id, boot, gate)
        self.member = self._voice.member = Member(
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
        is_preferred = spec.preferred == node_id
        founding = (spec.base_index, spec.base_term) if is_preferred else None
        self._elections = Elections(
            self.member, log, self._voice, clock, rng, settings, founding=founding
        )
        self._following = Following(
            self.member,
            log,
            self._voice,
            self._elections.heard_leader,
            clock,
            settings.heartbeat_s / 2,
        )
        self._leading: Replication | None = None
        self._leading_term = -1
        self._known_leader: tuple[str | None, int] = (None, 0)
        self._proposals = Proposals(spec.id, settings)
        self._applier = Applier(log, machine, settings, clock.monotonic())
        self.reads = Reading(
            spec.id,
            self.member,
            self._voice,
            self._applier,
            clock,
            settings,
            tell,
            inherited=log.last_index,
        )
        self._beat_s = 0.0
        self._notice_s = NEVER
        self._count = False  # the leader has a reason to count replicas again
        self._durable = log.durable_index
        self._transfer: tuple[str, float] | None = None
        self._resigned_to: set[str] = set()
        self.disk_full: AgentMemError | None = None

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
            full = self.disk_full or self._applier.stalled
            refusal = full or self._proposals.refusal(command)
        if refusal is not None:
            self._tell(done, refusal)
        else:
            self._proposals.add(command, done)

    def transfer(self, to: str | None) -> None:
        """Hand leadership over once the follower has everything; nothing new enters until then."""
        if self._leading is None or self._transfer is not None:
            return
        able = self._leading.able(to)
        if able is not None:
            self._transfer = (able, self._clock.monotonic() + self._settings.transfer_s_max)

    def resign(self) -> None:
        """Hand leadership over because this replica cannot serve it: in turn to each of the others,
        which may not be able to either."""
        if self._leading is None or self._transfer is not None:
            return
        to = self._leading.able(None, self._resigned_to)
        if to is None:
            self._resigned_to.clear()
            to = self._leading.able(None)
        if to is not None:
            self._resigned_to.add(to)
            self.transfer(to)

    def synced(self) -> bool:
        """A flush has ended. True when it covered entries of this group."""
        durable: int = self.log.durable_index
        moved: bool = durable != self._durable
        self._durable = durable
        self._count = self._count or moved
        return moved

    def abandon(self) -> None:
        """The group leaves this node."""
        error = ShuttingDown(f"group {self.spec.id} is no longer served here")
        for done, told in self._proposals.abandon(error):
            self._tell(done, told)
        self.reads.fail_all()

    # -- inputs from peers --

    def peer_up(self, peer: str) -> None:
        if peer in self._voice.peers:
            self._voice.up[peer] = None
            self.member.connected(peer)
            self._elections.peer_up()
            if self._leading is not None:
                self._leading.connected(peer)

    def peer_down(self, peer: str) -> None:
        if peer in self._voice.up:
            del self._voice.up[peer]
            self.member.disconnected(peer)
            self._following.session_ended()

    def receive(self, peer: str, frame: list[Any]) -> bool:
        """A well-formed frame of this group and epoch. False: it is a stranger's."""
        if peer not in self._voice.peers:
            return False
        handled = self._handle(peer, frame)
        self._follow_role()
        return handled

    def _handle(self, peer: str, frame: list[Any]) -> bool:
        match frame[0]:
            case Kind.APPEND:
                return self._following.on_append(peer, frame)
            case Kind.APPENDED:
                return self._on_appended(peer, frame)
            case Kind.REFUSED:
                return self._on_refused(peer, frame)
            case Kind.PROBE:
                return self.reads.on_probe(peer, frame)
            case Kind.PROBED:
                return self.reads.on_probed(peer, frame)
            case Kind.ASK_READ:
                return self.reads.on_ask_read(peer, frame)
            case Kind.READ_AT:
                return self.reads.on_read_at(peer, frame)
            case Kind.ASK_PREVOTE:
                return self._elections.on_ask_prevote(peer, frame)
            case Kind.PREVOTE:
                return self._elections.on_prevote(peer, frame)
            case Kind.ASK_VOTE:
                return self._elections.on_ask_vote(peer, frame)
            case Kind.VOTE:
                return self._elections.on_vote(peer, frame)
            case Kind.TAKE_OVER:
                return self._elections.on_take_over(peer, frame)
            case Kind.TERM_IS_OLD:
                return self._elections.on_term_is_old(peer, frame)
            case Kind.RESEED:
                return self._following.on_reseed(peer, frame)
            case other:
                raise AssertionError(f"no handler for frame kind {other}")

    def _on_appended(self, peer: str, frame: list[Any]) -> bool:
        index = frame[6]
        if not self._voice.is_answer_to_me(frame) or self._leading is None:
            return False
        known = self._leading.peers[peer].match_index
        if not self._leading.appended(peer, index):
            return False
        self._count = self._count or index > known
        self.member.acknowledged(peer, index)
        return True

    def _on_refused(self, peer: str, frame: list[Any]) -> bool:
        if not self._voice.is_answer_to_me(frame) or self._leading is None:
            return False
        self._leading.refused(peer, frame[6], frame[7])
        self.member.acknowledged(peer, None)
        return True

    # -- time --

    def tick(self, now_s: float) -> bool:
        """Do what is due. True when there is more to do at once."""
        member = self.member
        if not member.is_leader:
            self._elections.tick(now_s)
            self._follow_role()
        if member.is_leader:
            self._lead(now_s)
        if not member.is_leader and self._proposals.queued:
            for done, refusal in self._proposals.refuse_queued(member.leader):
                self._tell(done, refusal)
        more = self._apply(now_s)
        self.reads.serve(now_s)
        return more

    def _lead(self, now_s: float) -> None:
        member = self.member
        beat = now_s >= self._beat_s
        if beat or (self._count and member.commit_index < self.log.last_index):
            self._count = False
            member.tick()  # counts replicas, and steps down without a quorum
            self._follow_role()
        leading = self._leading
        if leading is None:
            return
        if self._proposals.queued:
            self.log.append(self._proposals.enter(self.log.last_index + 1, member.term))
            self._voice.mark()
        leading.commit_index = member.commit_index
        leading.feed()
        if not leading.untold():
            self._notice_s = NEVER
        elif now_s >= self._notice_s:
            leading.notice()
            self._notice_s = NEVER
        else:
            self._notice_s = min(self._notice_s, _next_multiple(NOTICE_S, now_s))
        if beat:
            # The same moments for all groups of a node: one wake-up, one burst to each peer.
            self._beat_s = _next_multiple(self._settings.heartbeat_s, now_s)
            for peer in leading.beat():
                self._voice.say(peer, Kind.RESEED, self.log.first_index)
            self.reads.probe()  # again: sessions that broke have taken questions with them
        if self._transfer is not None:
            self._hand_over(leading, *self._transfer, now_s)

    def _hand_over(self, leading: Replication, to: str, until_s: float, now_s: float) -> None:
        if now_s >= until_s:
            self._transfer = None
        elif (
            to in self._voice.up
            and leading.peers[to].match_index == self.log.last_index
            and self.member.hand_over(to)
        ):
            # Asked once. If that election fails, this leader goes on when the time is up.
            self._transfer = (self._node_id, until_s)

    def _apply(self, now_s: float) -> bool:
        was_stalled = self._applier.stalled is not None
        entries, results = self._applier.step(self.member.commit_index, now_s)
        if not entries:
            if self._applier.is_damaged or (self._applier.stalled and not was_stalled):
                self.resign()  # another node's disk may have room, or its state be whole
            return False
        self.member.applied(self._applier.applied_index)
        for done, outcome in self._proposals.applied(entries, results):
            self._tell(done, outcome)
        last = min(self.member.commit_index, self.log.durable_index)
        return bool(self._applier.applied_index < last)

    def next_wakeup(self) -> float:
        soonest = self.reads.next_wakeup()
        if self._applier.stalled is not None:
            soonest = min(soonest, self._applier.retry_s())
        if self._leading is None:
            return min(soonest, self.member.election_deadline)
        if self._transfer is not None:
            soonest = min(soonest, self._transfer[1])
        return min(soonest, self._beat_s, self._notice_s)

    # -- checkpoints and compaction --

    def checkpoint_due_s(self) -> float:
        return self._applier.checkpoint_due_s()

    def checkpoint_soon(self) -> None:
        self._applier.checkpoint_soon()

    def retain(self, index: int | None) -> None:
        """Keep the entries after `index` in the log, up to a bound; None: nobody needs them."""
        self._applier.retained = index

    def checkpoint(self, now_s: float) -> Any:
        """A job that makes the state machine durable, when one is due."""
        return self._applier.checkpoint(now_s)

    def checkpointed(self, job: Any) -> bool:
        """The job is done. True when the log has let go of entries."""
        self._applier.checkpointed(job)
        leading = self._leading
        return self._applier.compact(self._following.floor if leading is None else leading.floor())

    # -- view --

    @property
    def needs_reseed(self) -> bool:
        is_behind = self._leading is None and self._following.needs_reseed
        return is_behind or self._applier.is_damaged

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
            needs_reseed=self.needs_reseed,
        )

    # -- inside --

    def _follow_role(self) -> None:
        """React when the last input changed who leads."""
        member = self.member
        known = (member.leader, member.term)
        if known != self._known_leader:
            self._known_leader = known
            self.reads.role_changed()
        if not member.is_leader:
            self._leading = self.reads.leading = self._transfer = None
        elif self._leading is None or self._leading_term != member.term:
            self._leading_term = member.term
            self._leading = self.reads.leading = Replication(
                self._voice.peers, self._voice.up, self.log, self._settings, self._send_append
            )
            self._elections.won()
            self._beat_s = self._clock.monotonic()
            self._count = True

    def _send_append(
        self, peer: str, previous: int, previous_term: int, terms: Any, commands: Any
    ) -> None:
        # What a leader says about entries is true without its own disk: it does not count
        # itself before its flush (Raft thesis 10.2.1).
        assert self._leading is not None
        commit, lowest = self._leading.commit_index, self._leading.floor()
        self._voice.say(peer, Kind.APPEND, previous, previous_term, commit, lowest, terms, commands)

    def _member_says(self, peer: str, message: dict[str, Any]) -> None:
        if not self._following.receiving:
            self._elections.speak(peer, message)


def _next_multiple(step_s: float, now_s: float) -> float:
    return (floor(now_s / step_s + 1e-6) + 1) * step_s
