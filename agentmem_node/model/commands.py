"""The commands that a shard replicates, and what applying one answers.

Everything that needs a clock, chance, a model or the network was decided before a command was
made (`agentmem_node.service.write`); the command carries the outcome. On the wire a command is a
msgpack list that starts with its format version and kind:

    [1, WRITE, request_id, fingerprint, tenant, at_ms, atomic, [op, ...]]
    op = [ADD, id, record, vector, created_ms, expires_ms]
       | [UPDATE, id, read_version, record, vector, expires_ms]
       | [DELETE, id, read_version]
       | [REVIVE, id, read_version, record, vector, created_ms, expires_ms]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import msgpack

from agentmem_cluster.epochs.commands import Control, Sealed, is_control
from agentmem_cluster.epochs.commands import decode as decode_control
from agentmem_node.model.times import TIME_MS_MAX, TIME_MS_MIN

FORMAT: Final = 1
_WRITE: Final = 1
_ADD: Final = 1
_UPDATE: Final = 2
_DELETE: Final = 3
_REVIVE: Final = 4

REQUEST_ID_BYTES: Final = 16
FINGERPRINT_BYTES: Final = 8
# Bounds of a decoder that must survive any bytes; the service's own limits are far below.
COMMAND_OPS_MAX: Final = 10_000
TENANT_BYTES_MAX: Final = 1_024
VERSION_END: Final = 1 << 32

OpStatus = Literal["ok", "conflict", "not_found", "exists", "skipped"]


class Add(NamedTuple):
    """A new memory, at version 1. `record`: the JSON of `Memory`; `vector`: float32 bytes."""

    id: bytes
    record: bytes
    vector: bytes | None
    created_ms: int
    expires_ms: int | None


class Update(NamedTuple):
    """The next version of a memory, decided on `read_version`. `vector` None keeps the old one."""

    id: bytes
    read_version: int
    record: bytes
    vector: bytes | None
    expires_ms: int | None


class Delete(NamedTuple):
    """`read_version` None deletes whatever version is there."""

    id: bytes
    read_version: int | None


class Revive(NamedTuple):
    """A deleted memory lives again, at the version after `read_version`, which deleted it.

    Only a restore does this: an add never takes the id of a memory that was deleted.
    """

    id: bytes
    read_version: int
    record: bytes
    vector: bytes | None
    created_ms: int
    expires_ms: int | None


Op = Add | Update | Delete | Revive


class Write(NamedTuple):
    """Operations on memories of one tenant, applied in one transaction, each with its outcome.

    With `atomic`, none takes effect unless all do: the others then answer `skipped`.
    """

    request_id: bytes  # 16 bytes: the ledger answers a second arrival with the first result
    fingerprint: bytes  # up to 8 bytes of the request's body
    tenant: str
    at_ms: int
    ops: tuple[Op, ...]
    atomic: bool = False


class Outcome(NamedTuple):
    """What became of one operation. `version`: the one it made, or that stood in its way."""

    status: OpStatus
    id: bytes
    version: int


@dataclass(frozen=True, slots=True)
class WriteResult:
    """`index`: the log entry that took effect; of a replayed write, the first one's."""

    outcomes: tuple[Outcome, ...]
    replayed: bool
    index: int


@dataclass(frozen=True, slots=True)
class Mismatch:
    """This request id was used before, with another body: nothing was done."""

    index: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The bytes are not a command that this version can carry out: nothing was done."""

    reason: str


@dataclass(frozen=True, slots=True)
class EpochChanged:
    """A control entry was carried out, or did nothing because its time was past."""

    took_effect: bool


Result = WriteResult | Mismatch | Rejected | EpochChanged | Sealed
Command = Write | Control | Rejected


def encode_write(write: Write) -> bytes:
    """The bytes of a command. Raises ValueError on a value that `decode` would refuse."""
    ops: list[tuple[Any, ...]] = []
    for op in write.ops:
        if isinstance(op, Add):
            ops.append((_ADD, *op))
        elif isinstance(op, Update):
            ops.append((_UPDATE, *op))
        elif isinstance(op, Revive):
            ops.append((_REVIVE, *op))
        else:
            ops.append((_DELETE, *op))
    head = (FORMAT, _WRITE, write.request_id, write.fingerprint, write.tenant, write.at_ms)
    try:
        data: bytes = msgpack.packb((*head, write.atomic, ops))
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"a command holds a value that cannot be encoded: {error}") from error
    return data


def decode(command: bytes) -> Command:
    """The command in `command`, every field of it checked. Never raises."""
    if is_control(command):
        return decode_control(command) or Rejected("a control entry that this node does not know")
    try:
        value = msgpack.unpackb(command)
    # msgpack raises ValueError, its own ExtraData / StackError / FormatError (all ValueErrors),
    # and on some hostile headers TypeError or OverflowError.
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        return Rejected(f"not msgpack: {type(error).__name__}")
    if type(value) is not list or len(value) < 2:
        return Rejected("not a command")
    if value[0] != FORMAT or type(value[0]) is not int:
        return Rejected("a format version that this node does not know")
    if value[1] != _WRITE or type(value[1]) is not int:
        return Rejected("a command kind that this node does not know")
    if len(value) != 8:
        return Rejected("a write with missing or additional fields")
    _, _, request_id, fingerprint, tenant, at_ms, atomic, rows = value
    if type(request_id) is not bytes or len(request_id) != REQUEST_ID_BYTES:
        return Rejected("request_id is not 16 bytes")
    if type(fingerprint) is not bytes or len(fingerprint) > FINGERPRINT_BYTES:
        return Rejected("fingerprint is not up to 8 bytes")
    if type(tenant) is not str or not _is_tenant(tenant):
        return Rejected("tenant is not a text of 1 to 1,024 bytes")
    if not _is_time(at_ms):
        return Rejected("at_ms is not a time")
    if type(atomic) is not bool:
        return Rejected("atomic is not a boolean")
    if type(rows) is not list or len(rows) > COMMAND_OPS_MAX:
        return Rejected("ops is not a list of up to 10,000")
    ops: list[Op] = []
    for row in rows:
        op = _op(row)
        if op is None:
            return Rejected(f"operation {len(ops)} is malformed")
        ops.append(op)
    return Write(request_id, fingerprint, tenant, at_ms, tuple(ops), atomic)


def _op(row: Any) -> Op | None:
    if type(row) is not list or not row or type(row[0]) is not int:
        return None
    kind = row[0]
    if kind == _ADD and len(row) == 6:
        _, key, record, vector, created_ms, expires_ms = row
        if (
            type(key) is bytes
            and len(key) == 16
            and type(record) is bytes
            and (vector is None or type(vector) is bytes)
            and _is_time(created_ms)
            and (expires_ms is None or _is_time(expires_ms))
        ):
            return Add(key, record, vector, created_ms, expires_ms)
        return None
    if kind == _UPDATE and len(row) == 6:
        _, key, read_version, record, vector, expires_ms = row
        if (
            type(key) is bytes
            and len(key) == 16
            and _is_version(read_version)
            and type(record) is bytes
            and (vector is None or type(vector) is bytes)
            and (expires_ms is None or _is_time(expires_ms))
        ):
            return Update(key, read_version, record, vector, expires_ms)
        return None
    if kind == _DELETE and len(row) == 3:
        _, key, read_version = row
        if (
            type(key) is bytes
            and len(key) == 16
            and (read_version is None or _is_version(read_version))
        ):
            return Delete(key, read_version)
        return None
    if kind == _REVIVE and len(row) == 7:
        _, key, read_version, record, vector, created_ms, expires_ms = row
        if (
            type(key) is bytes
            and len(key) == 16
            and _is_version(read_version)
            and type(record) is bytes
            and (vector is None or type(vector) is bytes)
            and _is_time(created_ms)
            and (expires_ms is None or _is_time(expires_ms))
        ):
            return Revive(key, read_version, record, vector, created_ms, expires_ms)
    return None


def _is_time(value: Any) -> bool:
    return type(value) is int and TIME_MS_MIN <= value <= TIME_MS_MAX


def _is_version(value: Any) -> bool:
    # One below the end: the version that an update makes must fit its column too.
    return type(value) is int and 0 < value < VERSION_END - 1


def _is_tenant(tenant: str) -> bool:
    try:
        return 0 < len(tenant.encode()) <= TENANT_BYTES_MAX
    except UnicodeEncodeError:
        return False
