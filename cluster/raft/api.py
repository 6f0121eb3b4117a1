"""What a replicated state machine is, and what a replica group offers.

The cluster layer replicates bytes: it never looks into a command or a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

GROUP_META = "meta"


class Entry(NamedTuple):
    """One committed command. Entries of a group have consecutive indexes."""

    index: int  # type: ignore[assignment]  # tuple.index, which nobody calls on an entry
    term: int
    command: bytes


class StateMachine(Protocol):
    """Deterministic: state and results are a pure function of the entries applied, in order."""

    @property
    def applied_index(self) -> int:
        """The last entry in the visible state. 0 when fresh. After a restart: the checkpoint's."""
        ...

    @property
    def durable_index(self) -> int:
        """The last entry that would survive a power loss now; the journal keeps all later ones."""
        ...

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        """Apply a batch atomically; one result an entry, in order.

        A bad command is a *result* (an error value), never an exception. An exception here
        means the local disk or memory failed: the node stops.
        `applied_index` is `entries[-1].index` on return.
        """
        ...

    def checkpoint(self) -> Any:
        """Begin making the visible state durable.

        Returns None when there is nothing to do, or a job: `job.run()` may be called in another
        thread (it syncs); then `checkpoint_done(job)` on the loop moves `durable_index`.
        """
        ...

    def checkpoint_done(self, job: Any) -> None: ...

    def digest(self) -> bytes:
        """The rolling digest of everything applied: equal on replicas at the same index."""
        ...

    def close(self) -> None: ...


class Role(Enum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A replica group never changes members; a new epoch is a new group."""

    id: str  # "meta" or "s07"
    epoch: int
    members: tuple[str, ...]  # node ids, sorted
    # Who asks for the group's very first election at once, while the others wait their time.
    # Afterwards it means nothing: any member may lead.
    preferred: str | None = None
    # Where its log begins: the last entry of the epoch before, whose state it continues.
    base_index: int = 0
    base_term: int = 0


class Applied(NamedTuple):
    """The outcome of a proposal that was applied on this node."""

    index: int  # type: ignore[assignment]
    term: int
    result: Any


@dataclass(frozen=True, slots=True)
class GroupStatus:
    id: str
    epoch: int
    members: tuple[str, ...]
    role: Role
    term: int
    leader: str | None
    last_index: int
    commit_index: int
    applied_index: int
    durable_index: int
    first_index: int
    match_index: dict[str, int]  # leader only
    queued: int
    # The log that this replica misses is compacted everywhere: only a copy of the state helps.
    needs_reseed: bool = False
