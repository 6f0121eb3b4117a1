"""Commands on their way: queued, in the log, applied. Bounded, and each is answered at most once.

"Not done" is only ever said when it is certain: the command never entered a log, or another
entry was *applied* at its index. A lost leadership alone says nothing (pysyncobj reports
LEADER_CHANGED for commands that are applied all the same, D7): then the caller's deadline
decides, and a retry under the same request id is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from agentmem_cluster.errors import AgentMemError, NotLeader, Overloaded, TooLarge
from agentmem_cluster.raft.api import Applied, Entry
from agentmem_cluster.raft.settings import RaftSettings

Done = Callable[[Applied | AgentMemError], None]


class _Pending(NamedTuple):
    term: int
    size_bytes: int
    done: Done


class Proposals:
    """The proposals of one group on one node."""

    def __init__(self, group_id: str, settings: RaftSettings) -> None:
        self._group = group_id
        self._settings = settings
        self._queue: list[tuple[bytes, Done]] = []
        # By index. Two can wait at one index: an older leadership's and this one's.
        self._pending: dict[int, list[_Pending]] = {}
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    @property
    def queued(self) -> bool:
        return bool(self._queue)

    def refusal(self, command: bytes) -> AgentMemError | None:
        settings = self._settings
        size = len(command)
        if size > settings.command_bytes_max:
            return TooLarge(
                f"a command of {size} bytes is above the limit of {settings.command_bytes_max}",
                hint="Send the data in smaller parts.",
            )
        if self._count >= settings.queue_commands_max:
            return Overloaded(
                f"{self._count} writes to group {self._group} wait for their replicas already",
                hint="Retry a little later.",
            )
        if self._bytes + size > settings.queue_bytes_max:
            return Overloaded(
                f"{self._bytes} bytes of writes to group {self._group} wait for their replicas",
                hint="Retry a little later.",
            )
        return None

    def add(self, command: bytes, done: Done) -> None:
        self._count += 1
        self._bytes += len(command)
        self._queue.append((command, done))

    def enter(self, first_index: int, term: int) -> list[Entry]:
        """Give all that is queued its place in the log."""
        queue, self._queue = self._queue, []
        entries = []
        index = first_index
        pending = self._pending
        for command, done in queue:
            entries.append(Entry(index, term, command))
            waiting = _Pending(term, len(command), done)
            if index in pending:
                pending[index].append(waiting)
            else:
                pending[index] = [waiting]
            index += 1
        return entries

    def refuse_queued(self, leader: str | None) -> list[tuple[Done, NotLeader]]:
        """The leadership was lost before these entered a log: they are certainly not done."""
        queue, self._queue = self._queue, []
        self._count -= len(queue)
        self._bytes -= sum(len(command) for command, _ in queue)
        return [(done, not_leader(self._group, leader)) for _, done in queue]

    def applied(
        self, entries: Sequence[Entry], results: Sequence[Any]
    ) -> list[tuple[Done, Applied | AgentMemError]]:
        """Who is to be told what. To be called before any of them, so that none is told twice."""
        told: list[tuple[Done, Applied | AgentMemError]] = []
        pending = self._pending
        if not pending:
            return told
        for entry, result in zip(entries, results, strict=True):
            waiting = pending.pop(entry.index, None)
            if waiting is None:
                continue
            for term, size_bytes, done in waiting:
                self._count -= 1
                self._bytes -= size_bytes
                if term == entry.term:
                    told.append((done, Applied(entry.index, entry.term, result)))
                else:
                    told.append((done, not_leader(self._group, None)))
        return told

    def abandon(self, error: AgentMemError) -> list[tuple[Done, AgentMemError]]:
        """The group is leaving this node: nobody will ever tell these."""
        told: list[tuple[Done, AgentMemError]] = [(done, error) for _, done in self._queue]
        for waiting in self._pending.values():
            told += [(w.done, error) for w in waiting]
        self._queue, self._pending, self._count, self._bytes = [], {}, 0, 0
        return told


def not_leader(group_id: str, leader: str | None) -> NotLeader:
    if leader is None:
        return NotLeader(
            f"group {group_id} has no leader that this node knows of",
            hint="Retry: an election takes about a second.",
        )
    return NotLeader(f"{leader} leads group {group_id}", leader=leader)
