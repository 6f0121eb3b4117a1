"""How a leader feeds its followers: pipelined, in bounded pieces, and never backwards on an ack.

pysyncobj sets `nextIndex` from every acknowledgement, also from old ones that arrive while later
appends are on their way: it goes back, sends entries again, and the follower truncates what it
had acknowledged (D1). Here `next_index` only goes back when a follower says that it lacks
something. As in etcd's raft, a follower is *probed* until the point of agreement is known, and
then *fed*: appends leave without waiting for answers, up to a window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.frames import pack_terms
from agentmem_cluster.raft.settings import RaftSettings

ENTRY_OVERHEAD_BYTES = 16


class SourceLog(Protocol):
    first_index: int
    last_index: int

    def term_at(self, index: int) -> int: ...
    def slice(self, first: int, last: int, bytes_max: int) -> list[Entry]: ...


@dataclass(slots=True)
class Progress:
    """What the leader knows of one follower."""

    next_index: int
    match_index: int = 0
    probing: bool = False
    probe_sent: bool = False
    needs_reseed: bool = False
    spoken_to: bool = False  # since the last beat
    commit_told: int = 0
    inflight_bytes: int = 0
    inflight: deque[tuple[int, int]] = field(default_factory=deque)  # last index, bytes

    def probe_from(self, index: int) -> None:
        self.probing, self.probe_sent = True, False
        self.next_index = index
        self.inflight.clear()
        self.inflight_bytes = 0


# (peer, previous index, its term, runs of terms, commands): the group adds commit and floor.
Send = Callable[[str, int, int, list[list[int]], list[bytes]], None]


class Replication:
    """The followers of one leadership."""

    def __init__(
        self,
        peers: Sequence[str],
        up: Mapping[str, None],
        log: SourceLog,
        settings: RaftSettings,
        send: Send,
    ) -> None:
        self._log = log
        self._settings = settings
        self._send = send
        self._up = up  # the group's: who is connected now
        # The no-op that begins the leadership is in the log already: it is the first thing
        # sent, to everybody at once. Who lacks what precedes it refuses, and is probed.
        self.peers = {peer: Progress(next_index=log.last_index) for peer in peers}
        self.commit_index = 0  # what appends say is committed

    def connected(self, peer: str) -> None:
        """A new session: whatever was on its way is lost."""
        progress = self.peers[peer]
        progress.probe_from(max(progress.match_index + 1, progress.next_index))

    def appended(self, peer: str, index: int) -> bool:
        """An acknowledgement. False: it speaks of entries that this leader never had."""
        if index > self._log.last_index:
            return False
        progress = self.peers[peer]
        progress.needs_reseed = False
        progress.match_index = max(progress.match_index, index)
        while progress.inflight and progress.inflight[0][0] <= index:
            progress.inflight_bytes -= progress.inflight.popleft()[1]
        if progress.probing:
            progress.probing = False
            progress.next_index = progress.match_index + 1
        else:
            progress.next_index = max(progress.next_index, progress.match_index + 1)
        return True

    def refused(self, peer: str, previous: int, hint: int) -> None:
        """The follower lacks entry `previous`. Answers to older appends change nothing."""
        progress = self.peers[peer]
        if previous <= progress.match_index:
            return
        if progress.probing and previous != progress.next_index - 1:
            return
        lowest = progress.match_index + 1
        progress.probe_from(max(lowest, min(hint, previous)))

    def feed(self) -> None:
        """Send whatever the windows allow."""
        for peer in self._up:
            self._feed_one(peer, self.peers[peer])

    def beat(self) -> list[str]:
        """Say something to every follower that heard nothing since the last beat.

        Returns those who need entries that this log no longer has.
        """
        lost = []
        for peer in self._up:
            progress = self.peers[peer]
            if progress.probing or not progress.spoken_to:
                self._say_hello(peer, progress)
            progress.spoken_to = False
            if progress.needs_reseed:
                lost.append(peer)
        return lost

    def untold(self) -> bool:
        """Whether some follower that is fed does not know the commit index yet."""
        return any(self._is_untold(self.peers[peer]) for peer in self._up)

    def notice(self, only: str | None = None) -> None:
        """Tell the commit index now, by an append without entries, to those who do not know it."""
        for peer in self._up:
            progress = self.peers[peer]
            if only in (None, peer) and self._is_untold(progress):
                self._say_hello(peer, progress)

    def _is_untold(self, progress: Progress) -> bool:
        return not progress.probing and progress.commit_told < self.commit_index

    def able(self, to: str | None, besides: Container[str] = ()) -> str | None:
        """A follower that could take over soon: `to`, or of those not in `besides` the one that
        has most."""
        able = [
            peer
            for peer in self._up
            if to in (None, peer)
            and peer not in besides
            and not self.peers[peer].probing
            and not self.peers[peer].needs_reseed
        ]
        return max(able, key=lambda peer: (self.peers[peer].match_index, peer), default=None)

    def floor(self) -> int:
        """What every connected follower has: compaction leaves the rest for them."""
        matches = [self.peers[p].match_index for p in self._up if not self.peers[p].needs_reseed]
        return min(matches, default=self._log.last_index)

    def match_index(self) -> dict[str, int]:
        return {peer: progress.match_index for peer, progress in self.peers.items()}

    def reseeds(self) -> list[str]:
        return [peer for peer, progress in self.peers.items() if progress.needs_reseed]

    def _feed_one(self, peer: str, progress: Progress) -> None:
        log, settings = self._log, self._settings
        if progress.probing:
            if not progress.probe_sent:
                self._say_hello(peer, progress)
            return
        while progress.next_index <= log.last_index:
            if (
                progress.inflight_bytes >= settings.inflight_bytes_max
                or len(progress.inflight) >= settings.inflight_appends_max
            ):
                return
            first = progress.next_index
            if first < log.first_index:
                progress.needs_reseed = True
                progress.probe_from(first)
                return
            last = min(log.last_index, first + settings.append_entries_max - 1)
            entries = log.slice(first, last, settings.append_bytes_max)
            commands = [entry.command for entry in entries]
            size = sum(map(len, commands)) + ENTRY_OVERHEAD_BYTES * len(commands)
            progress.inflight.append((entries[-1].index, size))
            progress.inflight_bytes += size
            progress.next_index = entries[-1].index + 1
            progress.spoken_to = True
            progress.commit_told = self.commit_index
            self._send(peer, first - 1, log.term_at(first - 1), pack_terms(entries), commands)

    def _say_hello(self, peer: str, progress: Progress) -> None:
        """An append without entries: a heartbeat, a probe and a notice of commit in one."""
        log = self._log
        previous = progress.next_index - 1
        if previous < log.first_index - 1:
            progress.needs_reseed = True
            previous = log.first_index - 1
        progress.probe_sent = progress.probing
        progress.spoken_to = True
        progress.commit_told = self.commit_index
        self._send(peer, previous, log.term_at(previous), [], [])
