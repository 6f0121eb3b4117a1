"""The truth of one shard: memories, their order, their vectors and their history, in LMDB.

Writes are the primitives that `agentmem_node.engine.apply` decides on; reads are consistent with
the last entry applied. Everything happens on one thread (`agentmem_node.storage.environment`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from agentmem_node.storage.checkpoint import DATA_NAME, RecordDamaged, damaged
from agentmem_node.storage.environment import MAP_BYTES_DEFAULT, PAGE_ERRORS, Environment
from agentmem_node.storage.layout import (
    ADDED_LATER,
    DATABASES,
    DOC_HEAD_BYTES,
    HISTORY_HEAD,
    HISTORY_KEY,
    ID_ROW,
    ORDER_KEY,
    SUMS,
    U32,
    U64,
    DocRow,
    State,
    order_key,
    pack_doc,
    unpack_doc,
)
from agentmem_node.storage.ledger import ADDED, DELETED, UPDATED, Ledger, LedgerBounds
from agentmem_node.storage.scopes import Scope, Scopes
from agentmem_node.storage.sums import damaged as row_damaged
from agentmem_node.storage.sums import is_past, is_row, is_vector

if TYPE_CHECKING:
    from agentmem_node.storage.restrict import Outside

_FIRST_VERSION: Final = 1


class Located(NamedTuple):
    """Where an id leads. `deleted_version`: the version that deleted it; 0 while it lives."""

    doc: int
    deleted_version: int


class NewMemory(NamedTuple):
    id: bytes
    owner: Scope
    created_ms: int
    updated_ms: int
    expires_ms: int | None
    record: bytes
    vector: bytes | None


class HistoryRow(NamedTuple):
    """A version: `event` is an index into `ledger.EVENTS`; a DELETE has no record."""

    version: int
    at_ms: int
    event: int
    record: bytes


class _Reading:
    """Around whatever reads: damage is told to who watches, and what LMDB says of its own pages
    (or a row of another length than any) is damage."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> None:
        if self._store.failure is not None:
            raise self._store.failure

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (*PAGE_ERRORS, struct.error)):
            raise self._store.broken(error) from error
        if isinstance(error, RecordDamaged):
            self._store.on_damaged(error)


class Store:
    def __init__(self, env: Environment, state: State, bounds: LedgerBounds) -> None:
        self.env = env
        self.state = state
        self.scopes = Scopes(env, state)
        self.ledger = Ledger(env, state, bounds)
        self._ids = env.db["ids"]
        self._docs = env.db["docs"]
        self._vectors = env.db["vectors"]
        self._order = env.db["order"]
        self._history = env.db["history"]
        self._sums = env.db["sums"]
        # Told of a row whose checksum is wrong, before whoever reads it is.
        self.on_damaged: Callable[[RecordDamaged], None] = lambda error: None
        # A page of the file is none of LMDB's: then its transaction is of no more use.
        self.failure: RecordDamaged | None = None
        self.reading = _Reading(self)
        # Of a copy that is to be a part of this shard: what it is rid of already.
        self.outside: Outside | None = None
        self._no_vector = bytes(4 * state.dim)
        env.state = state.pack

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dim: int,
        map_bytes: int = MAP_BYTES_DEFAULT,
        bounds: LedgerBounds | None = None,
    ) -> Store:
        """The store in `folder`, as of its last checkpoint; a new one when there is no folder.

        Raises StorageDamaged, and InternalError when another process has it open.
        """
        if folder.exists():
            env = Environment(folder, DATABASES, map_bytes, ADDED_LATER)
        else:
            env = Environment.create(folder, DATABASES, State(dim).pack(), map_bytes)
        state = State.unpack(env.durable_state)
        what = None
        if state is None:
            what = "it has a format that this version does not know"
        elif state.dim != dim:
            what = f"it holds vectors of {state.dim} values, but the cluster's model has {dim}"
        if state is None or what is not None:
            env.close()
            raise damaged(folder / DATA_NAME, what or "")
        if not env.is_summed:
            try:
                env.txn.drop(env.db["sums"], delete=False)
            except PAGE_ERRORS as error:
                env.close()
                raise damaged(folder / DATA_NAME, str(error)) from error
        return cls(env, state, LedgerBounds() if bounds is None else bounds)

    # -- writes -------------------------------------------------------------------------

    def add(
        self, tenant: Scope, memories: Sequence[NewMemory], version: int = _FIRST_VERSION
    ) -> int:
        """Insert memories that do not live. Returns the number of the first; the rest follow."""
        state = self.state
        first = state.next_doc
        tenant_key = U32.pack(tenant.number)
        ids, docs, vectors, order, sums = [], [], [], [], []
        for doc, new in enumerate(memories, first):
            owner = new.owner
            key = U64.pack(doc)
            ids.append((tenant_key + new.id, ID_ROW.pack(doc, 0)))
            row = DocRow(
                new.id,
                tenant.number,
                owner.number,
                version,
                new.created_ms,
                new.updated_ms,
                new.expires_ms,
                new.record,
            )
            data = pack_doc(row)
            docs.append((key, data))
            sums.append((key, SUMS.pack(crc32(data), crc32(new.vector or b""))))
            if new.vector is not None:
                vectors.append((key, new.vector))
            order.append((order_key(owner.number, new.created_ms, new.id), key))
            self.scopes.count(owner, 1)
            if owner is not tenant:
                order.append((order_key(tenant.number, new.created_ms, new.id), key))
        if not docs:
            return first
        state.next_doc = first + len(docs)
        self.scopes.count(tenant, sum(new.owner is not tenant for new in memories))
        # Neighbours in key order share pages.
        order.sort()
        cursor = self.env.txn.cursor
        cursor(db=self._ids).putmulti(ids)
        # Numbers only grow: appending fills pages instead of splitting them in half.
        cursor(db=self._docs).putmulti(docs, append=True)
        cursor(db=self._sums).putmulti(sums, append=True)
        if vectors:
            cursor(db=self._vectors).putmulti(vectors, append=True)
        cursor(db=self._order).putmulti(order)
        return first

    def update(
        self,
        doc: int,
        old: DocRow,
        *,
        at_ms: int,
        expires_ms: int | None,
        record: bytes,
        vector: bytes | None,
    ) -> DocRow:
        """The next version of a memory; `vector` None keeps the one it has."""
        self._keep(doc, old)
        # Time never runs backwards in a record, whatever clock the writer had.
        updated = max(at_ms, old.updated_ms)
        new = old._replace(
            version=old.version + 1, updated_ms=updated, expires_ms=expires_ms, record=record
        )
        key, data, txn = U64.pack(doc), pack_doc(new), self.env.txn
        kept = txn.get(key, db=self._sums) if vector is None else None
        if kept is not None:
            vector_sum = SUMS.unpack(kept)[1]
        else:
            known = vector if vector is not None else txn.get(key, b"", db=self._vectors)
            vector_sum = crc32(known)
        txn.put(key, data, db=self._docs)
        txn.put(key, SUMS.pack(crc32(data), vector_sum), db=self._sums)
        if vector is not None:
            txn.put(key, vector, db=self._vectors)
        return new

    def delete(self, doc: int, old: DocRow, tenant: Scope, owner: Scope, at_ms: int) -> None:
        """Leave only the id and the history of a memory."""
        self._keep(doc, old)
        txn = self.env.txn
        key = U64.pack(doc)
        version = old.version + 1
        head = HISTORY_HEAD.pack(max(at_ms, old.updated_ms), DELETED)
        self._put_history(HISTORY_KEY.pack(doc, version), head)
        txn.put(U32.pack(tenant.number) + old.id, ID_ROW.pack(doc, version), db=self._ids)
        txn.delete(key, db=self._docs)
        txn.delete(key, db=self._vectors)
        txn.delete(key, db=self._sums)
        txn.delete(order_key(owner.number, old.created_ms, old.id), db=self._order)
        self.scopes.count(owner, -1)
        if owner is not tenant:
            txn.delete(order_key(tenant.number, old.created_ms, old.id), db=self._order)
            self.scopes.count(tenant, -1)

    def revive(self, tenant: Scope, doc: int, version: int, new: NewMemory) -> int:
        """Make a deleted memory live at `version`. Returns its new number: what is derived may
        lean on numbers that only grow. Its history goes with it."""
        key = U64.pack(self.state.next_doc)
        txn = self.env.txn
        updated_ms = new.updated_ms
        rows = self._history_rows(doc)
        for row_key, row in rows:
            self._check_history(row_key, row)
            updated_ms = max(updated_ms, HISTORY_HEAD.unpack_from(row)[0])
        added = self.add(tenant, [new._replace(updated_ms=updated_ms)], version)
        for row_key, row in rows:
            self._put_history(key + row_key[U64.size :], row)
            txn.delete(row_key, db=self._history)
            txn.delete(row_key, db=self._sums)
        return added

    def history_bytes(self, doc: int) -> int:
        """What the versions of a memory take that are not current."""
        return sum(len(key) + len(row) for key, row in self._history_rows(doc))

    def _history_rows(self, doc: int) -> list[tuple[bytes, bytes]]:
        rows = []
        cursor = self.env.txn.cursor(db=self._history)
        if cursor.set_range(HISTORY_KEY.pack(doc, 0)):
            for key, row in cursor:
                if HISTORY_KEY.unpack(key)[0] != doc:
                    break
                rows.append((key, row))
        return rows

    def _keep(self, doc: int, old: DocRow) -> None:
        event = ADDED if old.version == _FIRST_VERSION else UPDATED
        row = HISTORY_HEAD.pack(old.updated_ms, event) + old.record
        self._put_history(HISTORY_KEY.pack(doc, old.version), row)

    def _put_history(self, key: bytes, row: bytes) -> None:
        self.env.txn.put(key, row, db=self._history)
        self.env.txn.put(key, U32.pack(crc32(row)), db=self._sums)

    # -- reads --------------------------------------------------------------------------

    def locate(self, tenant: int, key: bytes) -> Located | None:
        row = self.env.txn.get(U32.pack(tenant) + key, db=self._ids)
        return None if row is None else Located(*ID_ROW.unpack(row))

    def row(self, doc: int) -> DocRow | None:
        """A live memory by its number. Raises RecordDamaged, as all that reads a memory does."""
        data = self._doc(doc)
        return None if data is None else unpack_doc(data)

    def of_scope(self, doc: int, scope: int) -> DocRow | None:
        """A live memory by its number, as one of a scope's. Raises RecordDamaged too when it is
        not: it must not be shown to another owner."""
        row = self.row(doc)
        if row is not None and scope not in (row.tenant, row.scope):
            raise self._damaged(f"what leads to memory number {doc}")
        return row

    def live(self, doc: int, key: bytes) -> DocRow:
        """The memory that an id leads to, which is not deleted. Raises RecordDamaged too when it
        leads nowhere, or to another one."""
        row = self.row(doc)
        if row is None or row.id != key:
            raise self._damaged(f"what leads to memory number {doc}")
        return row

    def record(self, doc: int) -> bytes | None:
        """The JSON of a live memory, without reading its header."""
        data = self._doc(doc)
        return None if data is None else data[DOC_HEAD_BYTES:]

    def _doc(self, doc: int) -> bytes | None:
        key, get = U64.pack(doc), self.env.txn.get
        data: bytes | None = get(key, db=self._docs)
        if data is not None and not is_row(get(key, db=self._sums), data):
            raise self._damaged(f"memory number {doc}")
        return data

    def vector(self, doc: int) -> bytes | None:
        key, get = U64.pack(doc), self.env.txn.get
        data: bytes | None = get(key, db=self._vectors)
        if not is_vector(get(key, db=self._sums), data):
            raise self._damaged(f"the vector of memory number {doc}")
        return data

    def vectors(self, docs: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shape (len(docs), dim); zeros where a memory has none. Not checked against the sums:
        a search takes hundreds, and a damaged one changes no answer but its rank."""
        get, db, pack, none = self.env.txn.get, self._vectors, U64.pack, self._no_vector
        joined = bytearray().join([get(pack(doc), none, db) for doc in docs])
        return np.frombuffer(joined, dtype="<f4").reshape(len(docs), self.state.dim)

    def newest(self, scope: int, after: tuple[int, bytes] | None) -> Iterator[DocRow]:
        """Live memories of a scope, by creation time and id, descending, from before `after` on.

        Nothing may be written while it is consumed.
        """
        cursor = self.env.txn.cursor(db=self._order)
        end = U32.pack(scope + 1) if after is None else order_key(scope, *after)
        # The first key at or past the end; the one before it is where to start.
        if cursor.set_range(end):
            if not cursor.prev():
                return
        elif not cursor.last():
            return
        for key, value in cursor.iterprev():
            found, _, memory_id = ORDER_KEY.unpack(key)
            if found != scope:
                return
            yield self.live(U64.unpack(value)[0], memory_id)

    def docs_of(self, scope: int) -> npt.NDArray[np.int64]:
        """The numbers of a scope's live memories, ascending."""
        cursor = self.env.txn.cursor(db=self._order)
        docs: list[bytes] = []
        if cursor.set_range(U32.pack(scope)):
            end = U32.pack(scope + 1)
            for key, value in cursor:
                if key >= end:
                    break
                docs.append(value)
        numbers = np.frombuffer(b"".join(docs), dtype=">i8").astype(np.int64)
        numbers.sort()
        if len(numbers) and not 0 < numbers[0] <= numbers[-1] < self.state.next_doc:
            raise self._damaged(f"the order of scope {scope}")
        return numbers

    def history(self, doc: int, limit: int) -> list[HistoryRow]:
        """The newest `limit` versions of a memory, live or deleted, oldest first."""
        rows: list[HistoryRow] = []
        current = self.row(doc)
        if current is not None:
            event = ADDED if current.version == _FIRST_VERSION else UPDATED
            rows.append(HistoryRow(current.version, current.updated_ms, event, current.record))
        cursor = self.env.txn.cursor(db=self._history)
        found = cursor.prev() if cursor.set_range(HISTORY_KEY.pack(doc + 1, 0)) else cursor.last()
        if found:
            for key, value in cursor.iterprev():
                of, version = HISTORY_KEY.unpack(key)
                if of != doc or len(rows) >= limit:
                    break
                self._check_history(key, value)
                at_ms, event = HISTORY_HEAD.unpack_from(value)
                rows.append(HistoryRow(version, at_ms, event, value[HISTORY_HEAD.size :]))
        rows.reverse()
        return rows

    def _check_history(self, key: bytes, row: bytes) -> None:
        if not is_past(self.env.txn.get(key, db=self._sums), row):
            doc, version = HISTORY_KEY.unpack(key)
            raise self._damaged(f"version {version} of memory number {doc}")

    def broken(self, error: Exception) -> RecordDamaged:
        """LMDB has met such a page."""
        if self.failure is None:
            self.failure = self._damaged(f"a page ({error})")
            self.on_damaged(self.failure)
        return self.failure

    def _damaged(self, what: str) -> RecordDamaged:
        return row_damaged(self.env.folder, what)

    def entries(self, database: str) -> int:
        """Rows of a sub-database, those not yet committed included; 0 of a broken file."""
        if self.failure is not None:
            return 0
        count: int = self.env.txn.stat(self.env.db[database])["entries"]
        return count
