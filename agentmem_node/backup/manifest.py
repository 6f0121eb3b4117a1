"""A backup is one object, its manifest, which is written last.

Until it is there, nothing of the backup can be seen; from then on everything that it names is
there. Its first line carries the format and the checksum of the rest:

    backups/<id>.json    {"agentmem_backup":1,"blake2b":"...","size_bytes":...}\n{...}
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from agentmem_cluster.shardmap import ShardMap
from agentmem_node.backup.chunks import HASH_BYTES
from agentmem_node.backup.content import DIGEST_BYTES, Content, total
from agentmem_node.backup.errors import BackupDamaged, damaged
from agentmem_node.storage.checkpoint import Checkpoint
from agentmem_node.storage.layout import State
from agentmem_node.storage.snapshot import CHUNK_BYTES

PREFIX: Final = "backups/"
SUFFIX: Final = ".json"
FORMAT: Final = 1


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What the vectors were made with; no cluster of another model can take them."""

    name: str
    dim: int
    model_hash: str


class ShardBackup(msgspec.Struct, frozen=True, kw_only=True):
    """One shard at the moment of the cut: its LMDB file in chunks, and what it must come to.

    `metas` and `state` are the checkpoint's; `chunks` holds 32 bytes for each MiB of the file.
    """

    id: str
    epoch: int
    applied_index: int
    term: int
    digest: bytes
    content: bytes
    memories: int
    size_bytes: int
    metas: bytes
    state: bytes
    chunks: bytes
    uploaded_chunks: int = 0
    uploaded_bytes: int = 0

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.metas, self.state)

    @property
    def hashes(self) -> list[bytes]:
        return [self.chunks[at : at + HASH_BYTES] for at in range(0, len(self.chunks), HASH_BYTES)]

    @property
    def newest_ms(self) -> int:
        """The latest time that any command in it named."""
        state = State.unpack(self.state)
        assert state is not None  # `_check` has seen to it
        return state.ledger_ms


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`at_ms`: a moment at which every shard stood still, on the clock of the node that asked.

    `map` is the shard map's wire form. `parent`: the newest backup when this one began.
    """

    id: str
    cluster_id: str
    cluster_name: str
    version: str
    at_ms: int
    took_ms: int
    model: Model
    map: dict[str, Any]
    shards: list[ShardBackup]
    parent: str | None = None

    @property
    def shard_map(self) -> ShardMap:
        return ShardMap.from_wire(self.map)

    @property
    def content(self) -> Content:
        return total([Content(s.memories, s.content) for s in self.shards])

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def uploaded_bytes(self) -> int:
        return sum(shard.uploaded_bytes for shard in self.shards)

    def shard(self, shard_id: str) -> ShardBackup:
        """Raises KeyError."""
        for shard in self.shards:
            if shard.id == shard_id:
                return shard
        raise KeyError(shard_id)


class _Head(msgspec.Struct, frozen=True):
    agentmem_backup: int
    blake2b: str
    size_bytes: int


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Manifest)
_head_decoder: Final = msgspec.json.Decoder(_Head)


def manifest_name(backup_id: str) -> str:
    return f"{PREFIX}{backup_id}{SUFFIX}"


def id_of(name: str) -> str | None:
    """The backup whose manifest an object's name is for."""
    if name.startswith(PREFIX) and name.endswith(SUFFIX):
        return name[len(PREFIX) : -len(SUFFIX)]
    return None


def encode(manifest: Manifest) -> bytes:
    body = _encoder.encode(manifest)
    head = _Head(FORMAT, _sum(body), len(body))
    return _encoder.encode(head) + b"\n" + body


def decode(name: str, data: bytes) -> Manifest:
    """Raises BackupDamaged for anything that `encode` has not made."""
    first, newline, body = data.partition(b"\n")
    try:
        head = _head_decoder.decode(first)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(name, "it is no manifest of a backup") from error
    if head.agentmem_backup != FORMAT:
        raise BackupDamaged(
            f"{name} has format {head.agentmem_backup}; this version reads {FORMAT}.",
            hint="Use the version of AgentMem that made the backup, or a later one.",
            object=name,
        )
    if not newline or len(body) != head.size_bytes or _sum(body) != head.blake2b:
        raise damaged(name, "its checksum or its length is wrong")
    try:
        manifest = _decoder.decode(body)
        _check(manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise damaged(name, str(error)) from error
    if manifest_name(manifest.id) != name:
        raise damaged(name, f"it is the manifest of {manifest.id}")
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError. The checksum says that it is as written; this, that it makes sense."""
    shards = {shard.id for shard in manifest.shards}
    if shards != set(manifest.shard_map.shards) or len(shards) != len(manifest.shards):
        raise ValueError("its shards are not those of its shard map")
    for shard in manifest.shards:
        chunks = -(-shard.size_bytes // CHUNK_BYTES)
        if shard.size_bytes <= 0 or len(shard.chunks) != chunks * HASH_BYTES:
            raise ValueError(f"shard {shard.id}: the number of its chunks is wrong")
        state = State.unpack(shard.state)
        if state is None:
            raise ValueError(f"shard {shard.id}: its state has a format that is not known")
        if (state.applied_index, state.digest) != (shard.applied_index, shard.digest):
            raise ValueError(f"shard {shard.id}: its state is not that of its entry")
        if state.dim != manifest.model.dim or len(shard.content) != DIGEST_BYTES:
            raise ValueError(f"shard {shard.id}: its dimension or its digest is wrong")


def _sum(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=32).hexdigest()
