"""The content digest: what a shard holds, whatever shard holds it and in whatever order it came.

The rolling digest (`Shard.digest`) proves that two replicas applied the same log. It cannot
compare a cluster of sixteen shards with one of four. This one is the sum, modulo 2^256, of the
hash of each logical row: memories with their vectors, past versions, deleted ids. Digests of
shards add up to the digest of their cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from agentmem_node.model.ids import format_id
from agentmem_node.storage.checkpoint import RecordDamaged
from agentmem_node.storage.layout import (
    HISTORY_HEAD,
    HISTORY_KEY,
    ID_ROW,
    SCOPE_HEAD,
    U32,
    U64,
    DocRow,
    unpack_doc,
)
from agentmem_node.storage.store import HistoryRow
from agentmem_node.storage.sums import is_past, is_row, is_vector

DIGEST_BYTES: Final = 32
_MODULUS: Final = 1 << (8 * DIGEST_BYTES)
_TENANTS: Final = U32.pack(0)


class Content(NamedTuple):
    """`memories`: live ones; `digest`: 32 bytes."""

    memories: int
    digest: bytes


EMPTY: Final = Content(0, bytes(DIGEST_BYTES))


class Row(NamedTuple):
    """Everything that is kept about one id. `live` is None for a deleted memory.

    `past`: the versions before the current one, oldest first; of a deleted memory its deletion
    is the last.
    """

    tenant: str
    id: bytes
    deleted_version: int
    live: DocRow | None
    vector: bytes | None
    past: list[HistoryRow]


def rows(txn: Any, db: Any, tenant_number: int = 0) -> Iterator[Row]:
    """The rows that an LMDB transaction sees, of all tenants or of one, by tenant and id.

    `db`: the sub-databases by name. Raises RecordDamaged: what is not as it was written must be
    no part of a backup, nor of what is restored.
    """
    names = tenants(txn, db)
    docs, vectors, history, sums = db["docs"], db["vectors"], db["history"], db["sums"]
    past = txn.cursor(db=history)
    cursor = txn.cursor(db=db["ids"])
    if not cursor.set_range(U32.pack(tenant_number)):
        return
    for key, value in cursor:
        (tenant,) = U32.unpack_from(key)
        if tenant_number and tenant != tenant_number:
            return
        doc, deleted_version = ID_ROW.unpack(value)
        number = U64.pack(doc)
        found = txn.get(number, db=docs)
        vector = txn.get(number, db=vectors)
        kept = txn.get(number, db=sums)
        if found is not None and not (is_row(kept, found) and is_vector(kept, vector)):
            raise RecordDamaged(f"Memory {format_id(key[U32.size :])} is not what was written.")
        yield Row(
            names[tenant],
            bytes(key[U32.size :]),
            deleted_version,
            None if found is None else unpack_doc(found),
            vector,
            _past(txn, past, sums, doc),
        )


def tenants(txn: Any, db: Any) -> dict[int, str]:
    """The name of each tenant, by its number."""
    cursor = txn.cursor(db=db["scopes"])
    names: dict[int, str] = {}
    if cursor.set_range(_TENANTS):
        for key, value in cursor:
            if not key.startswith(_TENANTS):
                break
            number, _ = SCOPE_HEAD.unpack_from(value)
            names[number] = value[SCOPE_HEAD.size :].decode()
    return names


def _past(txn: Any, cursor: Any, sums: Any, doc: int) -> list[HistoryRow]:
    found: list[HistoryRow] = []
    if cursor.set_range(HISTORY_KEY.pack(doc, 0)):
        for key, value in cursor:
            of, version = HISTORY_KEY.unpack(key)
            if of != doc:
                break
            if not is_past(txn.get(key, db=sums), value):
                raise RecordDamaged(f"Version {version} of a memory is not what was written.")
            at_ms, event = HISTORY_HEAD.unpack_from(value)
            found.append(HistoryRow(version, at_ms, event, value[HISTORY_HEAD.size :]))
    return found


class ContentDigest:
    """Adds rows up."""

    def __init__(self) -> None:
        self._sum = 0
        self._memories = 0

    def add(self, row: Row) -> None:
        tenant = row.tenant.encode()
        live = row.live
        if live is not None:
            self._memories += 1
            times = (live.created_ms, live.updated_ms, live.expires_ms)
            self._add(b"live", tenant, row.id, live.version, times, live.record, row.vector)
        else:
            self._add(b"dead", tenant, row.id, row.deleted_version, (), b"", None)
        for past in row.past:
            times = (past.at_ms, past.event, None)
            self._add(b"past", tenant, row.id, past.version, times, past.record, None)

    def result(self) -> Content:
        return Content(self._memories, self._sum.to_bytes(DIGEST_BYTES, "big"))

    def _add(
        self,
        kind: bytes,
        tenant: bytes,
        key: bytes,
        version: int,
        numbers: tuple[int | None, ...],
        record: bytes,
        vector: bytes | None,
    ) -> None:
        # Every length stands before its bytes: no two rows have the same text.
        size = -1 if vector is None else len(vector)
        head = b"%s %d %s %s %d %s %d %d " % (
            kind,
            len(tenant),
            tenant,
            key,
            version,
            repr(numbers).encode(),
            len(record),
            size,
        )
        row = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
        row.update(record)
        if vector is not None:
            row.update(vector)
        self._sum = (self._sum + int.from_bytes(row.digest(), "big")) % _MODULUS


def content_of(txn: Any, db: Any) -> Content:
    """The content of everything that an LMDB transaction sees."""
    digest = ContentDigest()
    for row in rows(txn, db):
        digest.add(row)
    return digest.result()


def total(parts: Iterator[Content] | list[Content]) -> Content:
    """The content of a cluster, of those of its shards."""
    memories, value = 0, 0
    for part in parts:
        memories += part.memories
        value = (value + int.from_bytes(part.digest, "big")) % _MODULUS
    return Content(memories, value.to_bytes(DIGEST_BYTES, "big"))
