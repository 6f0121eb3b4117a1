"""Linearizable reads without a log entry: one quorum round serves every read that waits.

Raft thesis 6.4. The leader notes its commit index, asks a majority whether it still leads, and
only then may a read at that index be served, by any replica that has applied it. A leader
that has committed nothing in its own term yet does not know the commit index and waits. A
follower asks the leader for an index; all its waiting reads share the question too.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

Confirmed = Callable[[int], None]
Failed = Callable[[], None]


class Local(NamedTuple):
    """A read on this node."""

    done: Confirmed
    failed: Failed
    expires_s: float
    until_s: float = float("inf")  # who asked has gone by then


# How often reads are looked for whose callers have gone.
_FORGET_EVERY_S = 1.0


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
        # A follower's questions that are not answered yet, oldest first, and who joined for each.
        self._asked = 0
        self._ask_again_s = 0.0
        self._questions: deque[tuple[int, list[Local]]] = deque()
        self._to_apply: list[tuple[int, int, Local]] = []
        self._forget_at_s = float("inf")

    def __len__(self) -> int:
        asked = sum(len(reads) for _, reads in self._questions)
        return len(self._waiting) + len(self._round_local) + asked + len(self._to_apply)

    @property
    def wants_round(self) -> bool:
        return not self._round_open and bool(self._waiting or self._remote)

    @property
    def open_round(self) -> int | None:
        """The round whose questions are to be repeated until a majority has answered."""
        return self._round if self._round_open else None

    def join(self, read: Local) -> None:
        self._waiting.append(read)

    def join_remote(self, read: Remote) -> None:
        """The newest question of a peer replaces its older ones: it has asked again."""
        self._remote[read.peer] = read

    # -- the leader's rounds --

    def begin_round(self, commit_index: int) -> list[Answer]:
        """All that wait now join `open_round`. Answers at once if there is nobody to ask."""
        self._round += 1
        self._round_index = commit_index
        self._round_acks.clear()
        self._round_local, self._waiting = self._waiting, []
        self._round_remote, self._remote = list(self._remote.values()), {}
        self._round_open = True
        return self._finish() if self._majority == 1 else []

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
        """The number of a question to send now, if one is due.

        It is for all reads that wait now, those of unanswered questions included: an answer on
        a slow way still serves the reads that it was asked for.
        """
        if self._questions and now_s < self._ask_again_s:
            return None
        while self._questions and not self._questions[0][1]:
            self._questions.popleft()  # all its reads have expired
        if not self._questions and not self._waiting:
            return None
        self._asked += 1
        self._ask_again_s = now_s + self._retry_s
        self._questions.append((self._asked, self._waiting))
        self._waiting = []
        return self._asked

    def answered(self, number: int, index: int) -> None:
        """The leader's answer, to this question and all before it; `NO_INDEX`: ask again later."""
        if index < 0:
            return
        while self._questions and self._questions[0][0] <= number:
            for read in self._questions.popleft()[1]:
                self.join_applied(index, read)

    # -- both --

    def role_changed(self) -> None:
        """What was asked of, or as, the old leader is asked anew."""
        self._waiting = self._unconfirmed()
        self._round_local, self._round_remote = [], []
        self._questions.clear()
        self._remote.clear()
        self._round_open = False

    def join_applied(self, index: int, read: Local) -> None:
        """A read whose index is known already, a token's: it only waits to be applied here."""
        self._sequence += 1
        self._forget_at_s = min(self._forget_at_s, read.until_s)
        heapq.heappush(self._to_apply, (index, self._sequence, read))

    def applied(self, index: int) -> None:
        while self._to_apply and self._to_apply[0][0] <= index:
            at, _, read = heapq.heappop(self._to_apply)
            read.done(at)

    def expire(self, now_s: float) -> None:
        """Refuse reads whose index no quorum has confirmed in time.

        Confirmed ones just wait, as long as somebody waits for them: an index from a token may
        never come to this node, and would take a place in the queue for ever.
        """
        if now_s >= self._forget_at_s:
            self._to_apply = [r for r in self._to_apply if r[2].until_s > now_s]
            heapq.heapify(self._to_apply)
            soonest = min((r[2].until_s for r in self._to_apply), default=float("inf"))
            self._forget_at_s = max(soonest, now_s + _FORGET_EVERY_S)
        if self._oldest_expires_s() > now_s:
            return
        late = [r for r in self._unconfirmed() if r.expires_s <= now_s]
        self._waiting = [r for r in self._waiting if r.expires_s > now_s]
        self._round_local = [r for r in self._round_local if r.expires_s > now_s]
        for _, reads in self._questions:
            reads[:] = [r for r in reads if r.expires_s > now_s]
        for read in late:
            read.failed()

    def next_wakeup(self) -> float:
        soonest = self._oldest_expires_s()
        return min(soonest, self._ask_again_s) if self._questions else soonest

    def _oldest_expires_s(self) -> float:
        if not self._waiting and not self._round_local and not self._questions:
            return float("inf")  # the usual case, asked in every tick of every group
        # Reads join in the order in which they expire, and go back in front of younger ones.
        lists = (self._round_local, *(reads for _, reads in self._questions), self._waiting)
        return min((reads[0].expires_s for reads in lists if reads), default=float("inf"))

    def fail_all(self) -> None:
        reads = [*self._unconfirmed(), *(read for _, _, read in self._to_apply)]
        self._waiting, self._round_local, self._to_apply = [], [], []
        self._questions.clear()
        for read in reads:
            read.failed()

    def _unconfirmed(self) -> list[Local]:
        asked = [read for _, reads in self._questions for read in reads]
        return [*self._round_local, *asked, *self._waiting]
