"""The checkpoint file: which snapshot of a data file survives a power loss, and the way back to it.

LMDB is run without its own syncs. Its file is then, after a power loss, a mixture of old and new
pages under any of the newer meta pages. The checkpoint file holds the two meta pages of a
snapshot whose every page was synced, and no page of that snapshot is written again before a
newer checkpoint file is in place (`agentmem_node.storage.environment` says why). Writing these
two pages back makes the data file that snapshot again, whatever else reached the disk.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agentmem_cluster.errors import InternalError, StateDamaged
from agentmem_cluster.failpoints import failpoint

FILE_NAME: Final = "checkpoint"
DATA_NAME: Final = "data.mdb"

_MAGIC: Final = b"AMCKPT01"
_HEAD: Final = struct.Struct(">8sII")  # magic, bytes of the meta pages, bytes of the state
_SUM_BYTES: Final = 16
# Two pages of the largest page size that a machine has, and a state of a few dozen bytes.
_FILE_BYTES_MAX: Final = 2 * 65_536 + 4_096


class StorageDamaged(InternalError):
    """A shard's files are not what was written. The node does not start on them."""

    code = "storage_damaged"


class RecordDamaged(StateDamaged):
    """A row is not what was written: its checksum is wrong. Another replica has it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`metas`: both LMDB meta pages. `state`: the bytes that the snapshot's own state row holds."""

    metas: bytes
    state: bytes


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint file, atomically and durably. On an OSError the old one stays."""
    body = _HEAD.pack(_MAGIC, len(checkpoint.metas), len(checkpoint.state))
    body += checkpoint.metas + checkpoint.state
    new = folder / (FILE_NAME + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write_all(fd, body + _sum(body))
        os.fsync(fd)
    finally:
        os.close(fd)
    failpoint("checkpoint.before_rename")
    new.replace(folder / FILE_NAME)
    failpoint("checkpoint.after_rename")
    sync_folder(folder)
    failpoint("checkpoint.after_dir_sync")


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises StorageDamaged when it is missing or not as written."""
    path = folder / FILE_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    body, checksum = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if len(body) < _HEAD.size or _sum(body) != checksum:
        raise damaged(path, "its checksum is wrong")
    magic, metas_bytes, state_bytes = _HEAD.unpack_from(body)
    if magic != _MAGIC:
        raise damaged(path, f"it has the format {magic!r}, which this version does not know")
    if len(body) != _HEAD.size + metas_bytes + state_bytes:
        raise damaged(path, "its length is wrong")
    metas = body[_HEAD.size : _HEAD.size + metas_bytes]
    return Checkpoint(metas, body[_HEAD.size + metas_bytes :])


def restore_metas(folder: Path, checkpoint: Checkpoint) -> None:
    """Make the data file the checkpoint's snapshot again. Only while nothing has it open.

    Not synced: should the power fail now, the next start does the same again.
    """
    path = folder / DATA_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    try:
        if os.pread(fd, len(checkpoint.metas), 0) != checkpoint.metas:
            written = os.pwrite(fd, checkpoint.metas, 0)
            if written != len(checkpoint.metas):
                raise OSError(f"{path}: only {written} bytes of the meta pages could be written")
    finally:
        os.close(fd)


def damaged(path: Path, what: str) -> StorageDamaged:
    return StorageDamaged(
        f"The shard's file {path} cannot be used: {what}.",
        hint="Other replicas still have the data. Stop the node, move the folder "
        f"{path.parent} away, and let this node receive the shard again.",
    )


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, all of their names durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_SUM_BYTES).digest()
