"""What the sub-databases of a shard hold, byte by byte.

    ids      tenant, id              -> doc, version at which it was deleted (0: it lives)
    docs     doc                     -> header, record (JSON)
    vectors  doc                     -> float32 little-endian
    order    scope, created, id      -> doc          each memory under its tenant and its owner
    history  doc, version            -> time, event, record    versions that are not current
    sums     doc                     -> CRC32 of its row in docs, of its vector
             doc, version            -> CRC32 of its row in history
    scopes   0, hash of a tenant     -> number, live memories, name
             tenant, hash of an owner -> the same
    feed     tenant, log index       -> time, (event, status, version, id) of each operation
    ledger   tenant, request id      -> log index, time, fingerprint
    due      log index               -> time, key in `ledger`     oldest first, to be forgotten
    state    "state"                 -> State

Numbers in keys are big-endian, so that they sort; a `doc` is a memory's number within the shard,
a `scope` the number of a tenant or of an owner of a tenant. The current version of a memory is
in `docs` alone: adding a memory writes no history.

A row without a sum was written by a version of AgentMem that had none, and is taken as it is.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

FORMAT: Final = 2
DATABASES: Final = (
    "ids",
    "docs",
    "vectors",
    "order",
    "history",
    "scopes",
    "feed",
    "ledger",
    "due",
    "sums",
)
# Databases that shards of earlier versions lack.
ADDED_LATER: Final = ("sums",)

DIGEST_BYTES: Final = 32
NAME_HASH_BYTES: Final = 16

U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")
ID_ROW: Final = struct.Struct(">QI")
ORDER_KEY: Final = struct.Struct(">IQ16s")
HISTORY_KEY: Final = struct.Struct(">QI")
HISTORY_HEAD: Final = struct.Struct(">qB")
SCOPE_HEAD: Final = struct.Struct(">IQ")
FEED_KEY: Final = struct.Struct(">IQ")
FEED_HEAD: Final = struct.Struct(">q")
FEED_OP: Final = struct.Struct(">BBI16s")
LEDGER_HEAD: Final = struct.Struct(">Qq")
DUE_HEAD: Final = struct.Struct(">q")
SUMS: Final = struct.Struct(">II")  # of a live memory: its row, its vector (of b"" without one)

# Moves signed times into the unsigned range, so that times before 1970 sort before later ones.
_TIME_BIAS: Final = 1 << 63
_NO_EXPIRY: Final = -(1 << 63)
_DOC_HEAD: Final = struct.Struct(">16sIIIqqq")
DOC_HEAD_BYTES: Final = _DOC_HEAD.size


class DocRow(NamedTuple):
    """A row of `docs`. `tenant` and `scope` are numbers of `scopes`; without an owner, equal."""

    id: bytes
    tenant: int
    scope: int
    version: int
    created_ms: int
    updated_ms: int
    expires_ms: int | None
    record: bytes


def pack_doc(row: DocRow) -> bytes:
    expires = _NO_EXPIRY if row.expires_ms is None else row.expires_ms
    return _DOC_HEAD.pack(*row[:6], expires) + row.record


def unpack_doc(data: bytes) -> DocRow:
    key, tenant, scope, version, created, updated, expires = _DOC_HEAD.unpack_from(data)
    return DocRow(
        key,
        tenant,
        scope,
        version,
        created,
        updated,
        None if expires == _NO_EXPIRY else expires,
        data[DOC_HEAD_BYTES:],
    )


def order_key(scope: int, created_ms: int, key: bytes) -> bytes:
    return ORDER_KEY.pack(scope, created_ms + _TIME_BIAS, key)


def name_hash(name: str) -> bytes:
    """Names may be longer than an LMDB key. 128 bits: nobody finds two names that collide."""
    return hashlib.blake2b(name.encode(), digest_size=NAME_HASH_BYTES).digest()


@dataclass(slots=True)
class State:
    """All of a shard that is not a row. Kept in memory, written with every commit."""

    dim: int
    applied_index: int = 0
    digest: bytes = bytes(DIGEST_BYTES)
    next_doc: int = 1
    next_scope: int = 1
    ledger_entries: int = 0
    ledger_ms: int = _NO_EXPIRY  # the ledger's own clock: the latest time that a command named
    epoch: int = 1  # whose commands take effect ...
    is_sealed: bool = False  # ... unless it has ended

    _FIRST = struct.Struct(f">HIQ{DIGEST_BYTES}sQIQq")
    _STRUCT = struct.Struct(f">HIQ{DIGEST_BYTES}sQIQqQ?")

    def pack(self) -> bytes:
        """As the oldest format that can say it, so that a node may be put back to the version
        before as long as no shard was moved."""
        head = (
            self.dim,
            self.applied_index,
            self.digest,
            self.next_doc,
            self.next_scope,
            self.ledger_entries,
            self.ledger_ms,
        )
        if self.epoch == 1 and not self.is_sealed:
            return self._FIRST.pack(1, *head)
        return self._STRUCT.pack(FORMAT, *head, self.epoch, self.is_sealed)

    @classmethod
    def unpack(cls, data: bytes) -> State | None:
        """None when the bytes are of a format that this version does not know."""
        for form, layout in ((1, cls._FIRST), (FORMAT, cls._STRUCT)):
            if len(data) == layout.size:
                found, *values = layout.unpack(data)
                return cls(*values) if found == form else None
        return None
