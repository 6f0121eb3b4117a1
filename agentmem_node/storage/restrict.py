"""One part of a shard that was split: everything outside its range of slots is removed.

Both parts begin as copies of the whole, at the same entry. What remains is the same on every
replica of a part: it depends on the rows alone. Requests that were answered before the split are
remembered by each part for its own memories, so a retry takes effect once there as well.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from agentmem_cluster.ring import slot_of_id
from agentmem_node.storage.layout import (
    DIGEST_BYTES,
    FEED_HEAD,
    FEED_OP,
    HISTORY_KEY,
    ID_ROW,
    SCOPE_HEAD,
    U32,
    U64,
    order_key,
    unpack_doc,
)
from agentmem_node.storage.store import Store

# Rows that are changed between two commits: their pages are in memory until then.
_BATCH: Final = 2_000

IsOutside = Callable[[bytes], bool]
T = TypeVar("T")


def restrict(store: Store, slot_start: int, slot_end: int) -> Iterator[int]:
    """Remove all memories whose slot is not in slot_start..slot_end-1, in steps.

    Yields how many were removed so far, after every few thousand. To be run to its end, with no
    entry applied meanwhile. Raises DiskFull, having left what may be done again.
    """

    def is_outside(memory_id: bytes) -> bool:
        return not slot_start <= slot_of_id(memory_id) < slot_end

    removed = 0
    fewer: Counter[int] = Counter()
    for batch in _batches(_live_outside(store, is_outside)):
        _reserve(store)
        for doc in batch:
            _remove_live(store, doc, fewer)
        removed += len(batch)
        yield removed
    for keys in _batches(_deleted_outside(store, is_outside)):
        _reserve(store)
        for key in keys:
            _remove_deleted(store, key)
        removed += len(keys)
        yield removed
    _reserve(store)
    _count_fewer(store, fewer)
    for position in _cut_feed(store, is_outside):
        yield removed + position
    state = store.state
    part = b"%s %d %d" % (state.digest, slot_start, slot_end)
    state.digest = hashlib.blake2b(part, digest_size=DIGEST_BYTES).digest()
    store.scopes.forget()


def _reserve(store: Store) -> None:
    """Removing copies pages before it frees them: at most about as many as there are."""
    store.env.commit()
    store.env.reserve(_BATCH * 16_384)


def _batches(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    return (rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH))


def _live_outside(store: Store, is_outside: IsOutside) -> list[int]:
    cursor = store.env.txn.cursor(db=store.env.db["docs"])
    return [U64.unpack(key)[0] for key, row in cursor if is_outside(bytes(row[:16]))]


def _deleted_outside(store: Store, is_outside: IsOutside) -> list[bytes]:
    cursor = store.env.txn.cursor(db=store.env.db["ids"])
    return [bytes(key) for key, row in cursor if ID_ROW.unpack(row)[1] and is_outside(key[4:])]


def _remove_live(store: Store, doc: int, fewer: Counter[int]) -> None:
    txn, db = store.env.txn, store.env.db
    key = U64.pack(doc)
    row = unpack_doc(txn.get(key, db=db["docs"]))
    txn.delete(key, db=db["docs"])
    txn.delete(key, db=db["vectors"])
    txn.delete(key, db=db["sums"])
    txn.delete(U32.pack(row.tenant) + row.id, db=db["ids"])
    for scope in {row.tenant, row.scope}:
        txn.delete(order_key(scope, row.created_ms, row.id), db=db["order"])
        fewer[scope] += 1
    if row.version > 1:  # the first one has no history
        _remove_history(store, doc)


def _remove_deleted(store: Store, key: bytes) -> None:
    txn, db = store.env.txn, store.env.db
    doc, _ = ID_ROW.unpack(txn.get(key, db=db["ids"]))
    txn.delete(key, db=db["ids"])
    _remove_history(store, doc)


def _remove_history(store: Store, doc: int) -> None:
    cursor = store.env.txn.cursor(db=store.env.db["history"])
    found = cursor.set_range(HISTORY_KEY.pack(doc, 0))
    while found and HISTORY_KEY.unpack(cursor.key())[0] == doc:
        store.env.txn.delete(cursor.key(), db=store.env.db["sums"])
        found = cursor.delete() and bool(cursor.key())


def _count_fewer(store: Store, fewer: Counter[int]) -> None:
    txn, db = store.env.txn, store.env.db["scopes"]
    changed = []
    for key, row in txn.cursor(db=db):
        number, memories = SCOPE_HEAD.unpack_from(row)
        if fewer[number]:
            head = SCOPE_HEAD.pack(number, memories - fewer[number])
            changed.append((bytes(key), head + row[SCOPE_HEAD.size :]))
    for key, row in changed:
        txn.put(key, row, db=db)


def _cut_feed(store: Store, is_outside: IsOutside) -> Iterator[int]:
    """Leave of each command's outcomes those of this part's memories."""
    db = store.env.db["feed"]
    after = b""
    position = 0
    while True:
        changed = []
        cursor = store.env.txn.cursor(db=db)
        found = cursor.set_range(after) if after else cursor.first()
        looked = 0
        while found and looked < _BATCH:
            key, row = bytes(cursor.key()), cursor.value()
            ops = list(FEED_OP.iter_unpack(row[FEED_HEAD.size :]))
            kept = [op for op in ops if not is_outside(op[3])]
            if len(kept) < len(ops):
                body = b"".join(FEED_OP.pack(*op) for op in kept)
                changed.append((key, bytes(row[: FEED_HEAD.size]) + body))
            looked += 1
            after = key + b"\0"
            found = cursor.next()
        for key, row in changed:
            store.env.txn.put(key, row, db=db)
        position += looked
        if not found:
            return
        _reserve(store)
        yield position
