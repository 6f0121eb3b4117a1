"""Which requests took effect, and how: exactly once, and a feed of changes for each tenant.

The outcome of a command is one row of the feed; the ledger points to it by the request id. The
ledger is bounded. What it forgets, and when, is a function of the commands alone (the times they
carry and their number): replicas forget the same entries at the same log index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from agentmem_node.model.commands import Delete, Op, OpStatus, Outcome, Update
from agentmem_node.model.memory import HistoryEvent
from agentmem_node.storage.environment import Environment
from agentmem_node.storage.layout import (
    DUE_HEAD,
    FEED_HEAD,
    FEED_KEY,
    FEED_OP,
    LEDGER_HEAD,
    U32,
    U64,
    State,
)
from agentmem_node.storage.sums import damaged

_STATUSES: Final[tuple[OpStatus, ...]] = ("ok", "conflict", "not_found", "exists", "skipped")
_STATUS_CODES: Final = {status: code for code, status in enumerate(_STATUSES)}
EVENTS: Final[tuple[HistoryEvent, ...]] = ("ADD", "UPDATE", "DELETE")
ADDED: Final = 0
UPDATED: Final = 1
DELETED: Final = 2
# One command adds one entry. Two or more are forgotten for it, so that age can catch up, and a
# few, so that no command pays for a quiet day before it.
_FORGET_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class LedgerBounds:
    """Equal on every replica of a shard: they decide what a retried command answers.

    The newest `entries_min` are kept whatever their age, so that one node whose clock is a day
    ahead cannot make the whole cluster forget at once.
    """

    entries_max: int = 200_000
    entries_min: int = 10_000
    age_ms_max: int = 24 * 3_600_000


class LedgerEntry(NamedTuple):
    log_index: int
    fingerprint: bytes


class FeedItem(NamedTuple):
    """One change of a tenant's memories. (log_index, position) is its place for ever."""

    log_index: int
    position: int
    at_ms: int
    event: HistoryEvent
    id: bytes
    version: int


class Ledger:
    def __init__(self, env: Environment, state: State, bounds: LedgerBounds) -> None:
        self._env = env
        self._state = state
        self._bounds = bounds
        self._feed = env.db["feed"]
        self._ledger = env.db["ledger"]
        self._due = env.db["due"]

    def find(self, tenant: int, request_id: bytes) -> LedgerEntry | None:
        row = self._env.txn.get(U32.pack(tenant) + request_id, db=self._ledger)
        if row is None:
            return None
        index, _ = LEDGER_HEAD.unpack_from(row)
        return LedgerEntry(index, row[LEDGER_HEAD.size :])

    def outcomes(self, tenant: int, index: int) -> tuple[Outcome, ...]:
        """What the command at a log index answered. Raises RecordDamaged."""
        row = self._env.txn.get(FEED_KEY.pack(tenant, index), db=self._feed)
        if row is None:
            raise damaged(self._env.folder, f"what leads to the outcome of entry {index}")
        return tuple(
            Outcome(_STATUSES[status], key, version)
            for _, status, version, key in FEED_OP.iter_unpack(row[FEED_HEAD.size :])
        )

    def put(
        self,
        tenant: int,
        index: int,
        at_ms: int,
        request_id: bytes,
        fingerprint: bytes,
        changes: bytes,
    ) -> None:
        """Record a command that was carried out. `changes` comes from `pack_outcomes`."""
        txn = self._env.txn
        key = U32.pack(tenant) + request_id
        now = self._state.ledger_ms = max(self._state.ledger_ms, at_ms)
        txn.put(FEED_KEY.pack(tenant, index), FEED_HEAD.pack(at_ms) + changes, db=self._feed)
        txn.put(key, LEDGER_HEAD.pack(index, now) + fingerprint, db=self._ledger)
        txn.put(U64.pack(index), DUE_HEAD.pack(now) + key, db=self._due, append=True)
        self._state.ledger_entries += 1
        self._forget(now)

    def feed(self, tenant: int, after: tuple[int, int], limit: int) -> list[FeedItem]:
        """Changes after (index, position), oldest first: at least `limit` when there are, and at
        most one command's more."""
        items: list[FeedItem] = []
        cursor = self._env.txn.cursor(db=self._feed)
        if not cursor.set_range(FEED_KEY.pack(tenant, after[0])):
            return items
        for key, row in cursor:
            found, index = FEED_KEY.unpack(key)
            if found != tenant or len(items) >= limit:
                break
            (at_ms,) = FEED_HEAD.unpack_from(row)
            ops = FEED_OP.iter_unpack(row[FEED_HEAD.size :])
            for position, (event, status, version, memory_id) in enumerate(ops):
                if status == 0 and (index, position) > after:
                    items.append(
                        FeedItem(index, position, at_ms, EVENTS[event], memory_id, version)
                    )
        return items

    def _forget(self, now: int) -> None:
        bounds, state = self._bounds, self._state
        if state.ledger_entries <= bounds.entries_min:
            return
        cursor = self._env.txn.cursor(db=self._due)
        if not cursor.first():
            return
        for _ in range(_FORGET_MAX):
            row = cursor.value()
            (at_ms,) = DUE_HEAD.unpack_from(row)
            is_old = at_ms + bounds.age_ms_max < now and state.ledger_entries > bounds.entries_min
            if not is_old and state.ledger_entries <= bounds.entries_max:
                return
            self._env.txn.delete(row[DUE_HEAD.size :], db=self._ledger)
            state.ledger_entries -= 1
            if not cursor.delete():
                return


def pack_outcomes(ops: Sequence[Op], outcomes: Sequence[Outcome]) -> bytes:
    """The feed's form of what became of a command's operations."""
    pack = FEED_OP.pack
    return b"".join(
        pack(_event(op), _STATUS_CODES[outcome.status], outcome.version, outcome.id)
        for op, outcome in zip(ops, outcomes, strict=True)
    )


def _event(op: Op) -> int:
    if isinstance(op, Update):
        return UPDATED
    return DELETED if isinstance(op, Delete) else ADDED
