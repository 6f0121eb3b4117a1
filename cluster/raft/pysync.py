"""pysyncobj 0.3.17, wrapped: the only file that knows its insides.

What is used of it: terms, votes and roles, log matching on followers, the commit rule on leaders,
hand-over of leadership. What is not, because it loses data (D1 to D16 of the findings, each with
a test in `tests/defects`): its journal, dumps, queue, batching, transport, pickle and membership
changes. They are replaced by overriding its private methods, whose names Python mangles: all of
them are listed below and verified at import, against the one version they were read in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from zlib import crc32

import pysyncobj.syncobj as stock
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from agentmem_cluster.raft.api import Entry, Role
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.runtime import Clock, Rng

VERSION_WRAPPED = "0.3.17"
METHODS = (
    "_SyncObj__applyLogEntries",
    "_SyncObj__deleteEntriesFrom",
    "_SyncObj__getCurrentLogIndex",
    "_SyncObj__getCurrentLogTerm",
    "_SyncObj__getEntries",
    "_SyncObj__onBecomeLeader",
    "_SyncObj__onMessageReceived",
    "_SyncObj__sendAppendEntries",
    "_SyncObj__setCurrentTerm",
    "_SyncObj__setState",
    "_SyncObj__tryLogCompaction",
    "_checkCommandsToApply",
    "_onTick",
)
FIELDS = (
    "_SyncObj__connectedNodes",
    "_SyncObj__lastResponseTime",
    "_SyncObj__newAppendEntriesTime",
    "_SyncObj__noopIDx",
    "_SyncObj__raftCommitIndex",
    "_SyncObj__raftCurrentTerm",
    "_SyncObj__raftElectionDeadline",
    "_SyncObj__raftLastApplied",
    "_SyncObj__raftLeader",
    "_SyncObj__raftLog",
    "_SyncObj__raftMatchIndex",
    "_SyncObj__raftState",
    "_SyncObj__transferInProgress",
)
GLOBALS = ("createJournal", "createPoller", "monotonicTime", "random")


def verify(package: Any, cls: Any, version: str) -> None:
    """Fail loudly, by name, when pysyncobj is not the one this file was written against."""
    missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
    assigned = set(cls.__init__.__code__.co_names) | set(_names_of(cls, "_SyncObj__onBecomeLeader"))
    missing += [name for name in FIELDS if name not in assigned]
    missing += [name for name in GLOBALS if not hasattr(package, name)]
    if version != VERSION_WRAPPED or missing:
        raise ImportError(
            f"pysyncobj {version} is installed, {VERSION_WRAPPED} is needed"
            + (f"; it lacks {', '.join(missing)}" if missing else "")
            + f": pip install pysyncobj=={VERSION_WRAPPED}"
        )


def _names_of(cls: Any, method: str) -> Sequence[str]:
    code = getattr(getattr(cls, method, None), "__code__", None)
    return () if code is None else code.co_names


verify(stock, SyncObj, VERSION)


class MemberLog(Protocol):
    """What is asked of a group's log here; `agentmem_cluster.journal` provides it."""

    first_index: int
    last_index: int
    durable_index: int
    term: int
    vote: str | None

    def term_at(self, index: int) -> int: ...
    def append(self, entries: Sequence[Entry]) -> None: ...
    def set_vote(self, term: int, vote: str | None) -> None: ...


# -- the package's globals, per core --
# pysyncobj looks its clock, chance, journal and poller up in module globals when it is called.
# Whoever is inside a call answers; outside of ours the package finds what it always had.


class _Inside:
    def __init__(self) -> None:
        self.member: Member | None = None


_inside = _Inside()
_stock_monotonic = stock.monotonicTime
_stock_random = stock.random
_stock_journal = stock.createJournal
_stock_poller = stock.createPoller


def _monotonic() -> float:
    member = _inside.member
    return float(_stock_monotonic()) if member is None else member.clock.monotonic()


class _Chance:
    def random(self) -> float:
        member = _inside.member
        return float(_stock_random.random()) if member is None else member.rng.random()

    def __getattr__(self, name: str) -> Any:
        return getattr(_stock_random, name)


class _NoPoller:
    def subscribe(self, *_: Any) -> None: ...
    def unsubscribe(self, *_: Any) -> None: ...
    def poll(self, _: float) -> None: ...


def _journal(path: str | None) -> Any:
    member = _inside.member
    return _stock_journal(path) if member is None else member.facade


def _poller(kind: str) -> Any:
    return _stock_poller(kind) if _inside.member is None else _NoPoller()


stock.monotonicTime = _monotonic
stock.random = _Chance()
stock.createJournal = _journal
stock.createPoller = _poller


class _Peer(Node):  # type: ignore[misc]
    """A node whose hash does not change between processes, so that sets iterate alike in all."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
        self._hash = crc32(node_id.encode())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self._id == other._id


class _Wire(Transport):  # type: ignore[misc]
    """Hands what pysyncobj says to the gate, as the dict it was."""

    def __init__(self, say: Callable[[str, dict[str, Any]], None]) -> None:
        super().__init__(None, None, None)
        self._say = say

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        self._say(node.id, message)
        return True


class _Facade:
    """The journal that pysyncobj sees. It never reads entries through it, it only adds."""

    def __init__(self, log: MemberLog, mark: Callable[[], None]) -> None:
        self._log = log
        self._mark = mark
        self.added: list[Entry] = []

    def __len__(self) -> int:
        return 1  # never "empty": pysyncobj would invent a first entry of its own

    def add(self, command: bytes, index: int, term: int) -> None:
        self.added.append(Entry(index, term, command))
        self._mark()

    def commit_added(self) -> None:
        if self.added:
            self._log.append(self.added)
            self.added = []

    def setCurrentTerm(self, term: int, vote: str | None) -> None:
        if (term, vote) != (self._log.term, self._log.vote):
            self._log.set_vote(term, vote)
            self._mark()

    def getCurrentTerm(self) -> int:
        return self._log.term

    def getVotedForNodeId(self) -> str | None:
        return self._log.vote

    def getRaftCommitIndex(self) -> int:
        return 0  # set from the state machine right after

    def setRaftCommitIndex(self, index: int) -> None: ...
    def onOneSecondTimer(self) -> None: ...
    def _destroy(self) -> None: ...


class _SyncObj(SyncObj):  # type: ignore[misc]
    """pysyncobj without its log, queue, dumps and sending; those are the group's."""

    def __init__(self, member: Member, me: _Peer, others: list[_Peer], conf: Any, wire: _Wire):
        self.member = member
        self.in_tick = False
        # While the leader counts replicas it must not count itself for what it has not synced.
        self.counting = False
        super().__init__(me, others, conf, transport=wire)

    def _onTick(self, timeToWait: float = 0.0) -> None:
        self.in_tick = True
        self.counting = self._SyncObj__raftState == 2
        try:
            super()._onTick(0.0)
        finally:
            self.in_tick = self.counting = False

    def _SyncObj__getCurrentLogIndex(self) -> int:
        log = self.member.log
        if self.counting:
            return min(log.durable_index, log.last_index)
        return log.last_index + len(self.member.facade.added)

    def _SyncObj__getCurrentLogTerm(self) -> int:
        added, log = self.member.facade.added, self.member.log
        return added[-1].term if added else log.term_at(log.last_index)

    def _SyncObj__getEntries(self, first: int, *_: Any, **__: Any) -> list[tuple[bytes, int, int]]:
        """Only ever the one entry, without its command: pysyncobj wants the term.

        It would delete whatever it saw after it, whether it conflicts or not (D1).
        """
        log = self.member.log
        if first is None or not log.first_index - 1 <= first <= log.last_index:
            return []
        return [(b"", first, log.term_at(first))]

    def _SyncObj__deleteEntriesFrom(self, index: int) -> None:
        raise AssertionError("only the group truncates, on a real conflict of terms")

    def _SyncObj__applyLogEntries(self) -> bool:
        self.counting = False
        return False

    def _SyncObj__sendAppendEntries(self) -> None:
        self._SyncObj__newAppendEntriesTime = float("inf")  # the group keeps the heartbeat

    def _SyncObj__onBecomeLeader(self) -> None:
        facade = self.member.facade
        super()._SyncObj__onBecomeLeader()
        # Its no-op is a byte that a user's command might be; ours is the empty command.
        facade.added = [Entry(e.index, e.term, b"") for e in facade.added]
        facade.commit_added()
        self.counting = self.in_tick

    def _checkCommandsToApply(self) -> None: ...
    def _SyncObj__tryLogCompaction(self) -> None: ...


_ROLES = (Role.FOLLOWER, Role.CANDIDATE, Role.LEADER)


class Member:
    """One member of one group: roles, terms, votes, matching and commit, driven from outside."""

    def __init__(
        self,
        node_id: str,
        members: Sequence[str],
        log: MemberLog,
        applied_index: int,
        settings: RaftSettings,
        clock: Clock,
        rng: Rng,
        *,
        say: Callable[[str, dict[str, Any]], None],
        mark: Callable[[], None],
    ) -> None:
        self.clock = clock
        self.rng = rng
        self.log = log
        self.facade = _Facade(log, mark)
        peers = {member: _Peer(member) for member in members}
        self._peers = {member: peer for member, peer in peers.items() if member != node_id}
        conf = SyncObjConf(
            autoTick=False,
            raftMinTimeout=settings.election_s_min,
            raftMaxTimeout=settings.election_s_max,
            appendEntriesPeriod=settings.heartbeat_s,
            connectionTimeout=settings.election_s_max,
            # Check-quorum: a leader that has not heard a majority for as long as a follower
            # waits at most for a leader is none.
            leaderFallbackTimeout=settings.election_s_max,
            commandsQueueSize=1,
        )
        _inside.member = self
        try:
            self._so = _SyncObj(self, peers[node_id], list(self._peers.values()), conf, _Wire(say))
        finally:
            _inside.member = None
        self._so._SyncObj__raftCommitIndex = applied_index
        self._so._SyncObj__raftLastApplied = applied_index

    # -- state --

    @property
    def role(self) -> Role:
        return _ROLES[self._so._SyncObj__raftState]

    @property
    def is_leader(self) -> bool:
        return bool(self._so._SyncObj__raftState == 2)

    @property
    def term(self) -> int:
        return int(self._so._SyncObj__raftCurrentTerm)

    @property
    def leader(self) -> str | None:
        node = self._so._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def commit_index(self) -> int:
        return int(self._so._SyncObj__raftCommitIndex)

    @property
    def noop_index(self) -> int:
        """Where this member's leadership began; only when it leads."""
        return int(self._so._SyncObj__noopIDx)

    @property
    def election_deadline(self) -> float:
        return float(self._so._SyncObj__raftElectionDeadline)

    @property
    def taking_over(self) -> bool:
        """The leader has asked this member to take its place, and the election is not begun."""
        return bool(self._so._SyncObj__transferInProgress)

    def match_index(self, peer: str) -> int:
        return int(self._so._SyncObj__raftMatchIndex.get(self._peers[peer], 0))

    # -- inputs --

    def applied(self, index: int) -> None:
        self._so._SyncObj__raftLastApplied = index

    def connected(self, peer: str) -> None:
        self._so._SyncObj__connectedNodes.add(self._peers[peer])

    def disconnected(self, peer: str) -> None:
        self._so._SyncObj__connectedNodes.discard(self._peers[peer])

    def postpone_election(self, seconds: float) -> None:
        self._so._SyncObj__raftElectionDeadline = self.clock.monotonic() + seconds

    def campaign(self) -> None:
        """Stand for election in the next term: votes were promised, or the leader asked for it."""
        self._so._SyncObj__raftElectionDeadline = float("-inf")
        self.tick()
        self._so._SyncObj__transferInProgress = False

    def forget_leader(self) -> None:
        if not self.is_leader:
            self._so._SyncObj__raftLeader = None

    def tick(self) -> None:
        before, _inside.member = _inside.member, self
        try:
            self._so._onTick()
            self.facade.commit_added()
        finally:
            _inside.member = before

    def receive(self, peer: str, message: dict[str, Any]) -> None:
        """A message in pysyncobj's own form, checked and completed by the group."""
        before, _inside.member = _inside.member, self
        try:
            self._so._SyncObj__onMessageReceived(self._peers[peer], message)
            self.facade.commit_added()
        finally:
            _inside.member = before

    def acknowledged(self, peer: str, index: int | None) -> None:
        """A follower has everything up to `index`; None: it has answered, with a refusal."""
        self.receive(
            peer,
            {
                "type": "next_node_idx",
                "reset": False,
                "success": index is not None,
                "next_node_idx": 1 if index is None else index + 1,
            },
        )

    def observe_term(self, term: int) -> None:
        """Somebody is in a later term: follow, without a leader and without a vote cast."""
        if term > self.term:
            self._so._SyncObj__setCurrentTerm(term, None)
            self._so._SyncObj__setState(0)
            self._so._SyncObj__raftLeader = None

    def hand_over(self, peer: str) -> bool:
        """Ask a follower that has everything to stand for election. False: it has not."""
        outcome: list[int] = []
        self._so.transferLeadership(self._peers[peer], lambda _, reason: outcome.append(reason))
        return outcome == [0]
