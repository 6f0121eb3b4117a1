"""Linearizable reads without a log entry: one quorum round serves every read that waits.

Raft thesis 6.4. The leader notes its commit index, asks a majority whether it still leads, and
only then may a read at that index be served, by any replica that has applied it. A leader
that has committed nothing in its own term yet does not know the commit index and waits. A
follower asks the leader for an index; all its waiting reads share the question too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

Confirmed = Callable[[int], None]
Failed = Callable[[], None]


class Local(NamedTuple):
    """A read on this node."""

    done: Confirmed
    failed: Failed
    expires_s: float


class Remote(NamedTuple):
    """A follower's question, for all the reads that wait there."""

    peer: str
    boot: bytes
    number: int


class Answer(NamedTuple):
    to: Remote
    read_index: int


class ReadIndex:
    """The reads of one group on one node, whatever the node's role is."""

    def __init__(self, members: int, retry_s: float) -> None:
        self._majority = members // 2 + 1
        self._retry_s = retry_s
        self._sequence = 0
        self._waiting: list[Local] = []
        self._remote: dict[str, Remote] = {}
        # A round of the leader, or a question to it: who waits for it.
        self._round = 0
        self._round_index = 0
        self._round_acks: set[str] = set()
        self._round_local: list[Local] = []
        self._round_remote: list[Remote] = []
        self._round_open = False
        self._asked = 0
        self._asked_until_s = 0.0
        self._asked_local: list[Local] = []
        self._to_apply: list[tuple[int, int, Local]] = []

    def __len__(self) -> int:
        return (
            len(self._waiting)
            + len(self._round_local)
            + len(self._asked_local)
            + len(self._to_apply)
        )

    @property
    def wants_round(self) -> bool:
        return not self._round_open and bool(self._waiting or self._remote)

    @property
    def in_round(self) -> int | None:
        return self._round if self._round_open else None

    def join(self, read: Local) -> None:
        self._waiting.append(read)

    def join_remote(self, read: Remote) -> None:
        """The newest question of a peer replaces its older ones: it has asked again."""
        self._remote[read.peer] = read

    # -- the leader's rounds --

    def begin_round(self, commit_index: int) -> tuple[int, list[Answer]]:
        """Everything that waits now joins; (round to ask followers about, answers if alone)."""
        self._round += 1
        self._round_index = commit_index
        self._round_acks.clear()
        self._round_local, self._waiting = self._waiting, []
        self._round_remote, self._remote = list(self._remote.values()), {}
        self._round_open = True
        return self._round, self._finish() if self._majority == 1 else []

    def probed(self, peer: str, round_: int) -> list[Answer]:
        """A follower still follows. The answers to send when that makes a majority."""
        if not self._round_open or round_ != self._round:
            return []
        self._round_acks.add(peer)
        return self._finish() if len(self._round_acks) + 1 >= self._majority else []

    def _finish(self) -> list[Answer]:
        self._round_open = False
        for read in self._round_local:
            self.join_applied(self._round_index, read)
        answers = [Answer(remote, self._round_index) for remote in self._round_remote]
        self._round_local, self._round_remote = [], []
        return answers

    # -- a follower's questions --

    def begin_ask(self, now_s: float) -> int | None:
        """The number of a question to send now, if one is due."""
        if self._asked_local and now_s >= self._asked_until_s:
            self._waiting = self._asked_local + self._waiting  # unanswered: ask again, together
            self._asked_local = []
        if self._asked_local or not self._waiting:
            return None
        self._asked += 1
        self._asked_until_s = now_s + self._retry_s
        self._asked_local, self._waiting = self._waiting, []
        return self._asked

    def answered(self, number: int, index: int) -> None:
        if number != self._asked or index < 0:
            return  # an older question, or a leader that cannot say: the retry asks again
        for read in self._asked_local:
            self.join_applied(index, read)
        self._asked_local = []

    # -- both --

    def role_changed(self) -> None:
        """What was asked of, or as, the old leader is asked anew."""
        self._waiting = self._round_local + self._asked_local + self._waiting
        self._round_local, self._asked_local, self._round_remote = [], [], []
        self._remote.clear()
        self._round_open = False

    def join_applied(self, index: int, read: Local) -> None:
        """A read whose index is known already, a token's: it only waits to be applied here."""
        self._sequence += 1
        heapq.heappush(self._to_apply, (index, self._sequence, read))

    def applied(self, index: int) -> None:
        while self._to_apply and self._to_apply[0][0] <= index:
            at, _, read = heapq.heappop(self._to_apply)
            read.done(at)

    def expire(self, now_s: float) -> None:
        """Refuse reads whose index no quorum has confirmed in time. Confirmed ones just wait."""
        if self._oldest_expires_s() > now_s:
            return
        late = [r for r in self._unconfirmed() if r.expires_s <= now_s]
        self._waiting = [r for r in self._waiting if r.expires_s > now_s]
        self._round_local = [r for r in self._round_local if r.expires_s > now_s]
        self._asked_local = [r for r in self._asked_local if r.expires_s > now_s]
        for read in late:
            read.failed()

    def next_wakeup(self) -> float:
        soonest = self._oldest_expires_s()
        return min(soonest, self._asked_until_s) if self._asked_local else soonest

    def _oldest_expires_s(self) -> float:
        # Reads join in the order in which they expire, and go back in front of younger ones.
        lists = (self._waiting, self._round_local, self._asked_local)
        return min((reads[0].expires_s for reads in lists if reads), default=float("inf"))

    def fail_all(self) -> None:
        reads = [*self._unconfirmed(), *(read for _, _, read in self._to_apply)]
        self._waiting, self._round_local, self._asked_local, self._to_apply = [], [], [], []
        for read in reads:
            read.failed()

    def _unconfirmed(self) -> list[Local]:
        return [*self._waiting, *self._round_local, *self._asked_local]
