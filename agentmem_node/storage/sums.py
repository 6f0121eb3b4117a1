"""Whether rows are what was written, by the checksums that stand beside them (`layout`).

LMDB keeps none of its own: a bit that flips on the disk would be served as somebody's memory. A
row without a sum is of an earlier version of AgentMem, and is taken as it is.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

import lmdb

from agentmem_node.storage.checkpoint import DATA_NAME, RecordDamaged
from agentmem_node.storage.layout import (
    DUE_HEAD,
    FEED_KEY,
    HISTORY_KEY,
    ID_ROW,
    LEDGER_HEAD,
    SCOPE_HEAD,
    SUMS,
    U32,
    U64,
    name_hash,
    order_key,
    unpack_doc,
)
from agentmem_node.storage.snapshot import StorageSnapshot

# Rows that are looked at before the snapshot is let go for a moment: whoever closes it waits.
_BATCH: Final = 100


def is_row(kept: bytes | None, row: bytes) -> bool:
    """Of a row of `docs`, by its entry of `sums`."""
    return kept is None or SUMS.unpack(kept)[0] == crc32(row)


def is_vector(kept: bytes | None, vector: bytes | None) -> bool:
    return kept is None or SUMS.unpack(kept)[1] == crc32(vector or b"")


def is_past(kept: bytes | None, row: bytes) -> bool:
    """Of a row of `history`."""
    return kept is None or U32.unpack(kept)[0] == crc32(row)


def damaged(folder: Path, what: str) -> RecordDamaged:
    return RecordDamaged(
        f"In {folder / DATA_NAME}, {what}: it is not what was written.",
        hint="Other replicas have it, and this one is made anew from them. Check the disk.",
    )


class _Seen(NamedTuple):
    """A memory that lives: the scopes that it counts in, and whether it has a vector."""

    scopes: frozenset[int]
    has_vector: bool


def scrub(snapshot: StorageSnapshot, db: Any, folder: Path) -> Iterator[int]:
    """Look at every row of a shard that is of use, in steps; yields how many rows a step saw.

    May be run in any thread; others may use the snapshot between the steps. Raises RecordDamaged,
    and OSError when the snapshot is closed meanwhile. Rows of `feed` and of `ledger` have no sums
    of their own: of those, only what leads to them is compared.

    A key that has rotted hides what it leads to, and only this finds that.
    """
    try:
        live = vectors = 0
        memories: Counter[int] = Counter()
        for batch in _batches(snapshot, db["ids"]):
            with snapshot.using() as txn:
                for key, value in batch:
                    seen = _memory(txn, db, key, value, folder)
                    if seen is not None:
                        live += 1
                        vectors += seen.has_vector
                        memories.update(seen.scopes)
            yield len(batch)
        in_order = memories.total()
        with snapshot.using() as txn:
            for name, found in (("docs", live), ("vectors", vectors), ("order", in_order)):
                there = txn.stat(db[name])["entries"]
                if there != found:
                    raise damaged(folder, f"{name} has {there} rows where {found} are due")
        for batch in _batches(snapshot, db["history"]):
            with snapshot.using() as txn:
                for key, value in batch:
                    if not is_past(txn.get(key, db=db["sums"]), value):
                        doc, version = HISTORY_KEY.unpack(key)
                        raise damaged(folder, f"version {version} of memory number {doc}")
            yield len(batch)
        for batch in _batches(snapshot, db["due"]):
            with snapshot.using() as txn:
                for key, value in batch:
                    request = value[DUE_HEAD.size :]
                    row = txn.get(request, db=db["ledger"])
                    index = U64.unpack(key)[0]
                    outcome = FEED_KEY.pack(U32.unpack_from(request)[0], index)
                    if (
                        row is None
                        or LEDGER_HEAD.unpack_from(row)[0] != index
                        or txn.get(outcome, db=db["feed"]) is None
                    ):
                        raise damaged(folder, f"what is remembered of entry {index}")
            yield len(batch)
        for batch in _batches(snapshot, db["scopes"]):
            for key, value in batch:
                number, count = SCOPE_HEAD.unpack_from(value)
                name = value[SCOPE_HEAD.size :].decode(errors="replace")
                if key[U32.size :] != name_hash(name) or memories[number] != count:
                    raise damaged(folder, f"scope {number}")
            yield len(batch)
        for batch in _batches(snapshot, db["feed"]):
            yield len(batch)
    except (lmdb.Error, struct.error) as error:
        raise damaged(folder, f"a page ({error})") from error


def _memory(txn: Any, db: Any, key: bytes, value: bytes, folder: Path) -> _Seen | None:
    """One row of `ids`, and what hangs on it. None: the memory is deleted."""
    doc, deleted_version = ID_ROW.unpack(value)
    number = U64.pack(doc)
    data = txn.get(number, db=db["docs"])
    if deleted_version:
        if data is not None:
            raise damaged(folder, f"memory number {doc}, which is deleted and is not")
        return None
    kept = txn.get(number, db=db["sums"])
    if data is None or not is_row(kept, data):
        raise damaged(folder, f"memory number {doc}")
    row = unpack_doc(data)
    if U32.pack(row.tenant) + row.id != key:
        raise damaged(folder, f"the id of memory number {doc}")
    vector = txn.get(number, db=db["vectors"])
    if not is_vector(kept, vector):
        raise damaged(folder, f"the vector of memory number {doc}")
    scopes = frozenset((row.tenant, row.scope))
    for scope in scopes:
        if txn.get(order_key(scope, row.created_ms, row.id), db=db["order"]) != number:
            raise damaged(folder, f"the place of memory number {doc} in its order")
    return _Seen(scopes, vector is not None)


def _batches(snapshot: StorageSnapshot, db: Any) -> Iterator[list[tuple[bytes, bytes]]]:
    """All rows of a sub-database, and that they are as many as it says."""
    after: bytes | None = None
    seen = 0
    while True:
        with snapshot.using() as txn:
            cursor = txn.cursor(db=db)
            found = cursor.first() if after is None else cursor.set_range(after + b"\0")
            batch: list[tuple[bytes, bytes]] = []
            while found and len(batch) < _BATCH:
                batch.append((bytes(cursor.key()), bytes(cursor.value())))
                found = cursor.next()
            entries = txn.stat(db)["entries"]
        if not batch:
            if seen != entries:
                raise lmdb.CorruptedError(f"{seen} rows of {entries} are to be found")
            return
        if after is not None and batch[0][0] <= after:
            raise lmdb.CorruptedError("its keys are out of order")
        after = batch[-1][0]
        seen += len(batch)
        yield batch
