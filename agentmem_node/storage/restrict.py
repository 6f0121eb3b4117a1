"""One part of a shard that is split: everything outside its range of slots is removed.

Both parts begin as copies of the whole. Most of what a part will not have is removed while its copy
still follows the whole's log (`trim`), so that little is left to do once that log has ended
(`restrict`), when writes wait. What a command comes to is part of the digest, on both sides of the
split; so of each memory that is gone the copy still knows what later commands may find (`Outside`).

What remains at the end is the same on every replica of a part, whenever each was trimmed: it
depends on the log alone. Requests that were answered before the split are remembered by each part
for its own memories, so a retry takes effect once there as well.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from agentmem_cluster.ring import slot_of_id
from agentmem_node.storage.layout import (
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

# Rows that are changed between two commits and in one go: others wait for about five milliseconds.
_BATCH: Final = 500
_LOOKED_AT: Final = 5_000

T = TypeVar("T")


def trim(store: Store, slot_start: int, slot_end: int) -> Iterator[int]:
    """Remove all memories whose slot is not in slot_start..slot_end-1, in steps.

    Yields how many are gone so far, after every few hundred. To be run to its end, with no entry
    applied meanwhile; entries may be applied from then on. Raises DiskFull: call it again later,
    and it goes on.
    """
    outside = store.outside
    if outside is None or outside.slots != (slot_start, slot_end):
        outside = store.outside = Outside(slot_start, slot_end)
    if outside.is_trimmed:
        return
    names: dict[int, str] = {}
    for rows in _pages(store, "scopes"):
        names |= (_named(key, row) for key, row in rows)
        yield len(outside.known)
    for rows in _pages(store, "ids"):
        located = [
            (key, *ID_ROW.unpack(row)) for key, row in rows if outside.covers(key[U32.size :])
        ]
        located.sort(key=_number)  # neighbours share pages
        yield len(outside.known)
        for batch in _batches(located):
            _reserve(store)
            for key, doc, deleted in batch:
                _remove(store, outside, names, key, doc, deleted)
            yield len(outside.known)
    for rows in _pages(store, "scopes"):
        _count_fewer(store, outside, rows)
        yield len(outside.known)
    store.scopes.forget()
    for _ in _cut_feed(store, outside):
        yield len(outside.known)
    outside.is_trimmed = True


def restrict(store: Store, slot_start: int, slot_end: int) -> Iterator[int]:
    """`trim`, or what is left of it, and then be the part: no entry of the whole's log follows."""
    yield from trim(store, slot_start, slot_end)
    store.state.digest = digest_of_part(store.state.digest, slot_start, slot_end)
    store.outside = None


def digest_of_part(digest: bytes, slot_start: int, slot_end: int) -> bytes:
    """With which digest a part begins when the whole ended with `digest`; of the same length."""
    part = b"%s %d %d" % (digest, slot_start, slot_end)
    return hashlib.blake2b(part, digest_size=len(digest)).digest()


class Seen(NamedTuple):
    """A memory as an operation finds it. `version` 0: never was there."""

    version: int
    is_live: bool
    owner: str


class Outside:
    """What a part knows of memories that it will not have, while the whole's log speaks of them.

    In memory, about 200 bytes for each: a copy that a crash cuts short begins anew anyway.
    """

    __slots__ = ("fewer", "is_trimmed", "known", "slots")

    def __init__(self, slot_start: int, slot_end: int) -> None:
        self.slots = (slot_start, slot_end)
        self.known: dict[bytes, Seen] = {}  # by key in `ids`
        self.fewer: Counter[int] = Counter()  # removed, but not yet from the counts of scopes
        self.is_trimmed = False

    def covers(self, memory_id: bytes) -> bool:
        return not self.slots[0] <= slot_of_id(memory_id) < self.slots[1]


def _reserve(store: Store) -> None:
    """Removing copies pages before it frees them: at most about as many as there are."""
    store.env.is_touched = True
    store.env.commit()
    store.env.reserve(_BATCH * 16_384)


def _batches(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    return (rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH))


def _pages(store: Store, name: str) -> Iterator[list[tuple[bytes, bytes]]]:
    """Some thousand rows of a table at a time; others may change between two."""
    after = b""
    while True:
        cursor = store.env.txn.cursor(db=store.env.db[name])
        found = cursor.set_range(after) if after else cursor.first()
        rows: list[tuple[bytes, bytes]] = []
        while found and len(rows) < _LOOKED_AT:
            rows.append((bytes(cursor.key()), bytes(cursor.value())))
            found = cursor.next()
        yield rows
        if not found:
            return
        after = rows[-1][0] + b"\0"


def _named(key: bytes, row: bytes) -> tuple[int, str]:
    """Of a scope: its number, and the owner that it is."""
    is_tenant = U32.unpack_from(key)[0] == 0
    return SCOPE_HEAD.unpack_from(row)[0], "" if is_tenant else row[SCOPE_HEAD.size :].decode()


def _number(row: tuple[bytes, int, int]) -> int:
    return row[1]


def _remove(
    store: Store, outside: Outside, names: dict[int, str], id_key: bytes, doc: int, deleted: int
) -> None:
    txn, db = store.env.txn, store.env.db
    txn.delete(id_key, db=db["ids"])
    if deleted:
        outside.known[id_key] = Seen(deleted, False, "")
        _remove_history(store, doc)
        return
    key = U64.pack(doc)
    row = unpack_doc(txn.get(key, db=db["docs"]))
    outside.known[id_key] = Seen(row.version, True, names[row.scope])
    txn.delete(key, db=db["docs"])
    txn.delete(key, db=db["vectors"])
    txn.delete(key, db=db["sums"])
    for scope in {row.tenant, row.scope}:
        txn.delete(order_key(scope, row.created_ms, row.id), db=db["order"])
        outside.fewer[scope] += 1
    if row.version > 1:  # the first one has no history
        _remove_history(store, doc)


def _remove_history(store: Store, doc: int) -> None:
    cursor = store.env.txn.cursor(db=store.env.db["history"])
    found = cursor.set_range(HISTORY_KEY.pack(doc, 0))
    while found and HISTORY_KEY.unpack(cursor.key())[0] == doc:
        store.env.txn.delete(cursor.key(), db=store.env.db["sums"])
        found = cursor.delete() and bool(cursor.key())


def _count_fewer(store: Store, outside: Outside, rows: list[tuple[bytes, bytes]]) -> None:
    if not any(outside.fewer.values()):
        return
    _reserve(store)
    for key, row in rows:
        number, memories = SCOPE_HEAD.unpack_from(row)
        fewer = outside.fewer.pop(number, 0)
        if fewer:
            head = SCOPE_HEAD.pack(number, memories - fewer)
            store.env.txn.put(key, head + row[SCOPE_HEAD.size :], db=store.env.db["scopes"])


def _cut_feed(store: Store, outside: Outside) -> Iterator[None]:
    """Leave of each command's outcomes those of this part's memories."""
    db = store.env.db["feed"]
    is_outside: Callable[[bytes], bool] = outside.covers
    after = b""
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
        if not found:
            return
        _reserve(store)
        yield
