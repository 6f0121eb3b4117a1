"""What to do to one memory of a running cluster, so that it becomes what a backup holds.

A pure decision, one operation at a time, on what the cluster has now. Where the cluster knows
nothing of a memory, or only an earlier part of its past, the backup's versions are replayed one
by one at their own times: the memory arrives with its version, its history and its times. Where
the cluster went on by itself, the backup's state becomes the next version: versions never go back.

Each operation is guarded by the version that was seen. Run again after an interruption, the
decision finds what is done already and does the rest.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal, NamedTuple

import msgspec

from agentmem_node.backup.content import Row
from agentmem_node.backup.errors import BackupDamaged
from agentmem_node.model.commands import Add, Delete, Op, Revive, Update
from agentmem_node.model.memory import Memory
from agentmem_node.model.records import decode_memory
from agentmem_node.model.times import parse_time_ms

HASH_BYTES: Final = 16

Did = Literal["added", "updated", "revived", "deleted", "unchanged"]

_encode: Final = msgspec.json.Encoder().encode


class Seen(NamedTuple):
    """A memory as the cluster has it. `version` 0: it never was there.

    `record` is `record_hash` of its record, `vector` the hash of its vector; b"" for none.
    """

    version: int
    is_live: bool
    record: bytes = b""
    vector: bytes = b""


ABSENT: Final = Seen(0, False)


class Step(NamedTuple):
    """One operation. `at_ms` None: now. `after`: what the cluster has when it took effect."""

    op: Op
    at_ms: int | None
    after: Seen


class _Version(NamedTuple):
    version: int
    at_ms: int
    record: bytes  # empty: it was deleted


def record_hash(record: bytes) -> bytes:
    """Equal for two versions that say the same: the version's own number does not count."""
    return hashlib.blake2b(with_version(record, 0), digest_size=HASH_BYTES).digest()


def vector_hash(vector: bytes | None) -> bytes:
    return b"" if vector is None else hashlib.blake2b(vector, digest_size=HASH_BYTES).digest()


def with_version(record: bytes, version: int) -> bytes:
    """The record as that version of its memory. Raises BackupDamaged when it is no record."""
    return _encode(msgspec.structs.replace(_memory(record), version=version))


def next_step(row: Row, seen: Seen, *, exact: bool, keep_deleted: bool) -> Step | None:
    """The next operation, or None when there is nothing left to do.

    `exact`: what the backup knows as deleted is deleted. `keep_deleted`: a memory that the
    cluster does not know is replayed although it was deleted, for its history's sake.
    Raises BackupDamaged when a record of the backup is none.
    """
    versions = _versions(row)
    if seen.version == 0:
        return _first(row, versions, keep_deleted=keep_deleted)
    replayed = _replay(row, versions, seen)
    if replayed is not None:
        return replayed
    live = row.live
    if live is None:
        if exact and seen.is_live:
            after = Seen(seen.version + 1, False)
            return Step(Delete(row.id, seen.version), None, after)
        return None
    wanted = _state(seen.version + 1, live.record, row.vector)
    if not seen.is_live:
        record = with_version(live.record, seen.version + 1)
        op: Op = Revive(row.id, seen.version, record, row.vector, live.created_ms, live.expires_ms)
        return Step(op, None, wanted)
    # An update cannot take a vector away: where the backup has none, the cluster's stays.
    same_vector = row.vector is None or wanted.vector == seen.vector
    if wanted.record == seen.record and same_vector:
        return None
    record = with_version(live.record, seen.version + 1)
    op = Update(row.id, seen.version, record, row.vector, live.expires_ms)
    return Step(op, None, wanted)


def did(before: Seen, row: Row, first: Step | None) -> Did:
    """What a restore makes of a memory, told by its first step."""
    if first is None:
        return "unchanged"
    if isinstance(first.op, Delete):
        return "deleted"
    if before.version == 0:
        return "added" if row.live is not None else "deleted"
    return "updated" if before.is_live else "revived"


# -- within -------------------------------------------------------------------------------


def _versions(row: Row) -> dict[int, _Version]:
    versions = {past.version: _Version(past.version, past.at_ms, past.record) for past in row.past}
    if row.live is not None:
        live = row.live
        versions[live.version] = _Version(live.version, live.updated_ms, live.record)
    return versions


def _first(row: Row, versions: dict[int, _Version], *, keep_deleted: bool) -> Step | None:
    """A memory that the cluster never had."""
    if row.live is None and not keep_deleted:
        return None
    is_whole = all(number in versions for number in range(1, max(versions, default=0) + 1))
    first = versions.get(1)
    if first is not None and is_whole and first.record:
        vector = row.vector if row.live is not None and row.live.version == 1 else None
        created_ms, expires_ms = _times(row, first)
        op = Add(row.id, first.record, vector, created_ms, expires_ms)
        return Step(op, first.at_ms, _state(1, first.record, vector))
    if row.live is None:
        return None
    # Its first versions are not kept: it begins with what it was last.
    record = with_version(row.live.record, 1)
    op = Add(row.id, record, row.vector, row.live.created_ms, row.live.expires_ms)
    return Step(op, row.live.updated_ms, _state(1, record, row.vector))


def _replay(row: Row, versions: dict[int, _Version], seen: Seen) -> Step | None:
    """The version that followed, if what the cluster has is a part of the backup's past."""
    here, following = versions.get(seen.version), versions.get(seen.version + 1)
    if here is None or following is None or bool(here.record) != seen.is_live:
        return None
    if seen.is_live and record_hash(here.record) != seen.record:
        return None
    is_last = row.live is not None and following.version == row.live.version
    vector = row.vector if is_last else None
    if not following.record:
        after = Seen(following.version, False)
        return Step(Delete(row.id, seen.version), following.at_ms, after)
    created_ms, expires_ms = _times(row, following)
    if seen.is_live:
        op: Op = Update(row.id, seen.version, following.record, vector, expires_ms)
        kept = seen.vector if vector is None else vector_hash(vector)
        after = Seen(following.version, True, record_hash(following.record), kept)
        return Step(op, following.at_ms, after)
    op = Revive(row.id, seen.version, following.record, vector, created_ms, expires_ms)
    return Step(op, following.at_ms, _state(following.version, following.record, vector))


def _state(version: int, record: bytes, vector: bytes | None) -> Seen:
    return Seen(version, True, record_hash(record), vector_hash(vector))


def _times(row: Row, version: _Version) -> tuple[int, int | None]:
    """(created, expires) of a version, in ms: the row's own for the current one."""
    live = row.live
    if live is not None and live.version == version.version:
        return live.created_ms, live.expires_ms
    memory = _memory(version.record)
    expires = memory.expires_at
    created_ms = parse_time_ms(memory.created_at, "created_at") if live is None else live.created_ms
    return created_ms, None if expires is None else parse_time_ms(expires, "expires_at")


def _memory(record: bytes) -> Memory:
    memory = decode_memory(record)
    if memory is None:
        raise BackupDamaged(f"A record in the backup is no memory: {record[:60]!r}.")
    return memory
