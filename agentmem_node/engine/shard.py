"""One shard on one node: the replicated state machine, and the reads that it answers.

`apply` obeys commands (`agentmem_node.engine.apply`), writes them to the store and tells the
derived index. Nothing here waits for a disk: what a power loss takes is replayed from the
journal, from `durable_index` on.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agentmem_cluster.epochs.commands import EpochState
from agentmem_cluster.errors import DiskFull, InternalError
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.apply import apply_command
from agentmem_node.engine.reads import StoreSource, memory_of, scope_of
from agentmem_node.index.source import Change, Source
from agentmem_node.model.commands import Command, Result, Revive, Write, WriteResult, decode
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import HistoryEntry, Memory
from agentmem_node.model.records import Page, Stored, decode_memory
from agentmem_node.model.times import format_ms
from agentmem_node.storage.checkpoint import RecordDamaged
from agentmem_node.storage.environment import MAP_BYTES_DEFAULT, PAGE_ERRORS, CheckpointJob
from agentmem_node.storage.layout import DocRow
from agentmem_node.storage.ledger import ADDED, EVENTS, FeedItem, LedgerBounds
from agentmem_node.storage.restrict import restrict, trim
from agentmem_node.storage.snapshot import StorageSnapshot
from agentmem_node.storage.store import Located, Store
from agentmem_node.storage.sums import scrub

if TYPE_CHECKING:
    from agentmem_node.index.shard_index import ShardIndex

# How much may be changed before the transaction is committed. Its changed pages are held in
# memory until then, in each shard of the node.
_COMMIT_BYTES: Final = 1 << 20
# What a command can add to the file at most, beyond twice its bytes: pages of the trees that it
# changes, most of them shared between commands.
_COMMAND_BYTES: Final = 16 << 10
_OP_BYTES: Final = 16 << 10
_HISTORY_VERSIONS: Final = 1_000


class Shard:
    """A `StateMachine`. All methods are called on one thread, except `run` of a checkpoint."""

    def __init__(
        self,
        store: Store,
        shard_id: str,
        index_factory: Callable[[Source], ShardIndex] | None,
    ) -> None:
        self.id = shard_id
        self.source = StoreSource(store)
        self._store = store
        self._durable_index = store.state.applied_index
        self._durable_next = 0
        self._failure: BaseException | None = None
        self._index = None if index_factory is None else index_factory(self.source)

    @classmethod
    def open(
        cls,
        folder: Path,
        shard_id: str,
        *,
        dim: int,
        map_size: int = MAP_BYTES_DEFAULT,
        index_factory: Callable[[Source], ShardIndex] | None = None,
        ledger: LedgerBounds | None = None,
    ) -> Shard:
        """The shard in `folder`, at its last checkpoint; a new one when there is no folder.

        `dim` 0: lexical only. Raises StorageDamaged, InternalError when another process has it.
        """
        store = Store.open(folder, dim=dim, map_bytes=map_size, bounds=ledger)
        return cls(store, shard_id, index_factory)

    @property
    def index(self) -> ShardIndex:
        """The derived index. Raises when the shard was opened without one."""
        if self._index is None:
            raise InternalError(f"Shard {self.id} was opened without an index.")
        return self._index

    def watch(self, on_damaged: Callable[[RecordDamaged], None]) -> None:
        """`on_damaged` is told of a row that is not what was written, before its reader is."""
        self._store.on_damaged = on_damaged

    def tell_damaged(self, error: RecordDamaged) -> None:
        """Whoever reads a snapshot of this shard has found such a row."""
        self._store.on_damaged(error)

    # -- the state machine --------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        return self._store.state.applied_index

    @property
    def durable_index(self) -> int:
        return self._durable_index

    @property
    def epoch_state(self) -> EpochState:
        """Which epoch's commands take effect, and whether it is sealed."""
        return EpochState(self._store.state.epoch, self._store.state.is_sealed)

    def digest(self) -> bytes:
        return self._store.state.digest

    def apply(self, entries: Sequence[Entry]) -> list[Result]:
        """One result an entry. Raises DiskFull, having applied none of them: try again later.

        RecordDamaged: what an entry builds on is not what was written. From then on it applies
        nothing and makes no checkpoint, and only a copy of another replica helps.
        After any other exception the shard refuses everything: the node must stop, and its next
        start replays the journal from the checkpoint.
        """
        self._check()
        if not entries:
            return []
        outside = self._store.outside
        if outside is not None and not outside.is_trimmed:
            raise ValueError(f"shard {self.id} is being trimmed: no entry may be applied before")
        expected = range(self.applied_index + 1, self.applied_index + 1 + len(entries))
        if any(entry.index != index for entry, index in zip(entries, expected, strict=True)):
            raise ValueError(
                f"shard {self.id} is at entry {self.applied_index} and was given "
                f"{entries[0].index} to {entries[-1].index}: an entry is missing or repeated"
            )
        writes = [decode(entry.command) for entry in entries]
        cost = [
            _cost(entry.command, write) + self._moved_bytes(write)
            for entry, write in zip(entries, writes, strict=True)
        ]
        env = self._store.env
        env.reserve(sum(cost))
        failpoint("apply.before_batch")
        results = []
        changes: list[Change] = []
        to_come = sum(cost)
        try:
            for entry, write, size in zip(entries, writes, cost, strict=True):
                results.append(
                    apply_command(self._store, entry.index, entry.command, write, changes)
                )
                to_come -= size
                if env.reserved - to_come >= _COMMIT_BYTES:
                    env.commit(to_come)
            self._store.scopes.flush()
            if changes and self._index is not None:
                self._index.apply(changes)
            failpoint("apply.after_batch")
        except (*PAGE_ERRORS, struct.error) as error:
            raise self._store.broken(error) from error
        except BaseException as error:
            self._failure = error
            if isinstance(error, RecordDamaged):
                self._store.on_damaged(error)
            raise
        return results

    def checkpoint(self) -> CheckpointJob | None:
        if self._damage is not None:
            return None  # an entry may be half applied
        self._check()
        try:
            job = self._store.env.begin_checkpoint()
        except PAGE_ERRORS as error:
            self._store.broken(error)
            return None
        except BaseException as error:
            self._failure = error
            raise
        if job is not None:
            self._durable_next = self.applied_index
        return job

    @property
    def is_checkpointing(self) -> bool:
        """A checkpoint was begun and is not known to have succeeded: none begins before it does."""
        return self._store.env.is_checkpointing

    @property
    def has_failed(self) -> bool:
        """An earlier failure left it in an unknown state: only opening it anew helps."""
        return self._failure is not None or self._damage is not None

    def checkpoint_done(self, job: CheckpointJob) -> None:
        self._store.env.checkpoint_done(job)
        self._durable_index = self._durable_next

    def open_snapshot(self) -> StorageSnapshot:
        """What is visible now, to be copied elsewhere. Close it soon: it keeps pages from reuse."""
        self._check()
        try:
            return self._store.env.open_snapshot()
        except PAGE_ERRORS as error:
            raise self._store.broken(error) from error
        except BaseException as error:
            self._failure = error
            raise

    def scrub(self, snapshot: StorageSnapshot) -> Iterator[int]:
        """Look at every row of a snapshot of this shard: `agentmem_node.storage.sums.scrub`."""
        return scrub(snapshot, self.databases, self._store.env.folder)

    def rebase(self, index: int, ended: int) -> None:
        """Take the place of the final state of epoch `ended`, whose last entry is `index`: what
        was restored from a backup becomes the beginning of a newer log."""
        self._check()
        state = self._store.state
        if index < state.applied_index:
            raise ValueError(f"shard {self.id} is at entry {state.applied_index}, after {index}")
        state.applied_index, state.epoch, state.is_sealed = index, ended, True

    def trim(self, slot_start: int, slot_end: int) -> Iterator[int]:
        """Remove what is not of these slots, in steps; yields how many memories are gone so far.

        Of a copy that nobody has searched yet. It goes on following the log of the whole, with the
        whole's digest, and comes to the same in the end as one that was not trimmed: `restrict`.
        Raises DiskFull: call it again later. No entry may be applied before it has ended.
        """
        self._check()
        yield from self._unless_it_fails(trim(self._store, slot_start, slot_end))

    def restrict(self, slot_start: int, slot_end: int) -> Iterator[int]:
        """Be the part of these slots from now on: `trim`, where that was not done, and its end.

        Once, of a copy that nobody has searched yet, between its seal and its next epoch.
        """
        self._check()
        yield from self._unless_it_fails(restrict(self._store, slot_start, slot_end))

    def _unless_it_fails(self, steps: Iterator[int]) -> Iterator[int]:
        try:
            yield from steps
        except (DiskFull, GeneratorExit):  # called again, it goes on where it was
            raise
        except BaseException as error:
            self._failure = error
            raise

    def abandon(self) -> None:
        """Close without a checkpoint: the files are about to be removed."""
        if self._index is not None:
            self._index.close()
        self._store.env.close()

    @property
    def databases(self) -> dict[str, Any]:
        """The sub-databases, for reading through a snapshot's own transaction."""
        return self._store.env.db

    def close(self) -> None:
        """Leave a checkpoint behind, when that works: the next start has then nothing to replay."""
        try:
            job = None if self._failure else self.checkpoint()  # none of what is damaged either
            if job is not None:
                job.run()
                self.checkpoint_done(job)
        except (OSError, InternalError, DiskFull):
            # The journal still holds everything after the checkpoint before.
            pass
        finally:
            if self._index is not None:
                self._index.close()
            self._store.env.close()

    # -- reads --------------------------------------------------------------------------

    def get(self, tenant: str, key: bytes) -> Stored | None:
        """A live memory; expired ones too (`Stored.is_expired`)."""
        with self._store.reading:
            found = self._find(tenant, key)
        return None if found is None else _stored(found[1])

    def get_many(self, tenant: str, keys: Sequence[bytes]) -> list[Stored | None]:
        return [self.get(tenant, key) for key in keys]

    def inspect(self, tenant: str, key: bytes) -> tuple[int, bytes | None, bytes | None]:
        """(version, record, vector) of an id: the record of a deleted memory is None, and the
        version of one that never was here is 0."""
        with self._store.reading:
            located = self._locate(tenant, key)
            if located is None:
                return 0, None, None
            if located.deleted_version:
                return located.deleted_version, None, None
            row = self._store.live(located.doc, key)
            return row.version, row.record, self._store.vector(located.doc)

    def history(
        self, tenant: str, key: bytes, limit: int = _HISTORY_VERSIONS
    ) -> list[HistoryEntry]:
        """The newest `limit` versions, oldest first, of a live or deleted memory."""
        with self._store.reading:
            located = self._locate(tenant, key)
            if located is None:
                return []
            # One more than asked: an entry says what the content was before it.
            rows = self._store.history(located.doc, limit + 1)
        entries: list[HistoryEntry] = []
        before: Memory | None = None
        for row in rows:
            after = decode_memory(row.record) if row.record else None
            shown = after or before
            # Nothing lived before it: the first version, or one that a restore brought back.
            event = EVENTS[ADDED if before is None and after is not None else row.event]
            entries.append(
                HistoryEntry(
                    memory_id=format_id(key),
                    event=event,
                    version=row.version,
                    old_content=None if before is None else before.content,
                    new_content=None if after is None else after.content,
                    at=format_ms(row.at_ms),
                    metadata={} if shown is None else shown.metadata,
                )
            )
            before = after
        return entries[max(0, len(entries) - limit) :]

    def count(self, tenant: str | None = None, owner: str | None = None) -> int:
        """Live memories of an owner, a tenant or all, expired ones included; without a scan."""
        if tenant is None:
            return self._store.entries("docs")
        return self.source.count(tenant, owner)

    def feed(self, tenant: str, after: tuple[int, int], limit: int) -> list[FeedItem]:
        """Changes of a tenant's memories after a place in its feed, oldest first."""
        with self._store.reading:
            scope = self._store.scopes.tenant(tenant)
            return [] if scope is None else self._store.ledger.feed(scope.number, after, limit)

    def ledger_lookup(self, tenant: str, request_id: bytes) -> WriteResult | None:
        """What a write under this request id answered, if the shard still remembers one."""
        with self._store.reading:
            scope = self._store.scopes.tenant(tenant)
            entry = None if scope is None else self._store.ledger.find(scope.number, request_id)
            if scope is None or entry is None:
                return None
            outcomes = self._store.ledger.outcomes(scope.number, entry.log_index)
        return WriteResult(outcomes, replayed=True, index=entry.log_index)

    def stats(self) -> dict[str, int]:
        """Figures for operators: rows, and bytes of the file as of the last commit."""
        store = self._store
        memories = store.entries("docs")
        return {
            "memories": memories,
            "vectors": store.entries("vectors"),
            "tombstones": store.entries("ids") - memories,
            "history_versions": store.entries("history"),
            "ledger_entries": store.state.ledger_entries,
            "bytes": store.env.used_bytes,
            "file_bytes": store.env.file_bytes,
            "applied_index": self.applied_index,
            "durable_index": self.durable_index,
        }

    def page(
        self,
        tenant: str,
        owner: str | None,
        *,
        accept: Callable[[Memory], bool] | None,
        after: tuple[int, bytes] | None,
        limit: int,
        now_ms: int,
        scan_max: int,
    ) -> Page:
        """A part of `list` that looks at no more than `scan_max` memories, and may be short.

        A caller that filters many lets others run between pages.
        """
        items: list[Stored] = []
        with self._store.reading:
            scope = scope_of(self._store, tenant, owner)
            if scope is None:
                return Page(items, None)
            last = None
            for scanned, row in enumerate(self._store.newest(scope.number, after)):
                if len(items) >= limit or scanned >= scan_max:
                    return Page(items, last)
                last = (row.created_ms, row.id)
                if row.expires_ms is not None and row.expires_ms <= now_ms:
                    continue
                if accept is None or accept(memory_of(row)):
                    items.append(_stored(row))
        return Page(items, None)

    def list(
        self,
        tenant: str,
        owner: str | None,
        *,
        accept: Callable[[Memory], bool] | None,
        after: tuple[int, bytes] | None,
        limit: int,
        now_ms: int,
    ) -> list[Stored]:
        """Live memories of an owner, or of the tenant, newest first, ties by id, descending.

        `after`: (created_ms, id) of the last one seen.
        """
        page = self.page(
            tenant,
            owner,
            accept=accept,
            after=after,
            limit=limit,
            now_ms=now_ms,
            scan_max=sys.maxsize,
        )
        return page.items

    # -- within -------------------------------------------------------------------------

    def _moved_bytes(self, write: Command) -> int:
        """A memory that is made live again takes its history with it, however long that is."""
        if not isinstance(write, Write):
            return 0
        moved = 0
        for op in write.ops:
            if isinstance(op, Revive) and (located := self._locate(write.tenant, op.id)):
                moved += 2 * self._store.history_bytes(located.doc)
        return moved

    @property
    def _damage(self) -> RecordDamaged | None:
        failure = self._store.failure or self._failure
        return failure if isinstance(failure, RecordDamaged) else None

    def _check(self) -> None:
        if self._damage is not None:
            raise self._damage
        if self._failure is not None:
            raise InternalError(
                f"Shard {self.id} failed earlier: {self._failure}.",
                hint="Start the node again; nothing acknowledged is lost.",
            ) from self._failure

    def _locate(self, tenant: str, key: bytes) -> Located | None:
        scope = self._store.scopes.tenant(tenant)
        return None if scope is None else self._store.locate(scope.number, key)

    def _find(self, tenant: str, key: bytes) -> tuple[int, DocRow] | None:
        located = self._locate(tenant, key)
        if located is None or located.deleted_version:
            return None
        return located.doc, self._store.live(located.doc, key)


def _stored(row: DocRow) -> Stored:
    return Stored(row.id, row.record, row.version, row.created_ms, row.updated_ms, row.expires_ms)


def _cost(command: bytes, write: Command) -> int:
    """Bytes that the file may grow by, at most, for one command."""
    ops = len(write.ops) if isinstance(write, Write) else 0
    return 2 * len(command) + _COMMAND_BYTES + ops * _OP_BYTES
