"""The one gate for effects: what a member says leaves only after the flush that makes it true.

Raft's safety rests on promises: "I voted for you", "these entries are mine". A promise that a
power loss can undo loses acknowledged writes (20 of 20 simulated worlds with a log that is not
synced). So frames that speak of persistent state wait here for the flush that covers all that
was buffered when they were written, as in etcd's `Ready`. One flush serves every group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from agentmem_cluster.failpoints import failpoint

# Raft repeats whatever is lost, so beyond this what waits for a stuck disk is let go.
HELD_MAX = 65_536


class Gate:
    """Flushes are numbered; a held frame knows the number of the flush it waits for."""

    def __init__(self) -> None:
        self._begun = 0
        self._ended = 0
        self._dirty = False
        self._failed = False
        self._held: deque[tuple[int, str, list[Any]]] = deque()
        self._free: dict[str, list[Any]] = {}

    @property
    def wants_flush(self) -> bool:
        """Something is buffered that no flush covers yet, and none is under way."""
        return (self._dirty and self._begun == self._ended) or self._failed

    @property
    def flushing(self) -> bool:
        return self._begun > self._ended and not self._failed

    @property
    def open(self) -> bool:
        """Some frame may leave now."""
        return bool(self._free)

    def mark(self) -> None:
        """The journal's buffer changed."""
        self._dirty = True

    def flush_begun(self) -> None:
        if self._failed:
            self._failed = False  # the same once more: it covers nothing that came since
        else:
            self._begun += 1
            self._dirty = False

    def flush_failed(self) -> None:
        """For want of room: it will be begun again, with the same content."""
        self._failed = True

    def flush_ended(self) -> None:
        self._ended = self._begun
        while self._held and self._held[0][0] <= self._ended:
            _, peer, frame = self._held.popleft()
            self._let(peer, frame)
        failpoint("gate.after_release")

    def say(self, peer: str, frame: list[Any]) -> None:
        """A frame that is true whatever happens to this node's disk."""
        self._let(peer, frame)

    def promise(self, peer: str, frame: list[Any]) -> None:
        """A frame that speaks of what this node has written."""
        if not self._dirty and self._begun == self._ended:
            self._let(peer, frame)
        elif len(self._held) < HELD_MAX:
            self._held.append((self._begun + self._dirty, peer, frame))

    def forget(self, peer: str) -> None:
        """The session is gone: what was meant for it must not reach the next one."""
        self._free.pop(peer, None)
        self._held = deque(h for h in self._held if h[1] != peer)

    def take(self) -> list[tuple[str, list[Any]]]:
        taken = [(peer, frames) for peer, frames in self._free.items() if frames]
        self._free = {}
        return taken

    def held(self) -> Iterator[tuple[str, list[Any]]]:
        return ((peer, frame) for _, peer, frame in self._held)

    def _let(self, peer: str, frame: list[Any]) -> None:
        waiting = self._free.get(peer)
        if waiting is None:
            self._free[peer] = [frame]
        else:
            waiting.append(frame)
