"""Content-addressed chunks: an object's name is the hash of the plain bytes within.

A chunk that is there already is never sent again, which is what makes a backup incremental, and
a chunk that is not what its name says cannot be mistaken for it.

    chunks/3f/3f9a...   "AMC1", codec (0 plain, 1 zlib), checksum of the rest, the rest
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Final

from agentmem_node.backup.errors import damaged
from agentmem_node.backup.objects import ObjectStore

PREFIX: Final = "chunks/"
HASH_BYTES: Final = 32
CHUNK_BYTES_MAX: Final = 1 << 20

_MAGIC: Final = b"AMC1"
_HEAD: Final = struct.Struct(">4sB8s")
_PLAIN: Final = 0
_ZLIB: Final = 1
# Text shrinks to a third at the fastest level, vectors by a twentieth: not worth a core that
# requests are waiting for. So a few samples are tried first.
_LEVEL: Final = 1
_WORTH: Final = 0.85
_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 4 << 10


def chunk_name(digest: bytes) -> str:
    """The object of a chunk: folders of a 256th each, because directories of millions are slow."""
    text = digest.hex()
    return f"{PREFIX}{text[:2]}/{text}"


def hash_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def _shrinks(data: bytes) -> bool:
    step = len(data) // _SAMPLES
    if step <= _SAMPLE_BYTES:
        return True
    sample = b"".join(data[at : at + _SAMPLE_BYTES] for at in range(0, step * _SAMPLES, step))
    return len(zlib.compress(sample, _LEVEL)) < len(sample) * _WORTH


def _sum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def pack(data: bytes) -> bytes:
    """The object's bytes for a chunk of up to 1 MiB."""
    if len(data) > CHUNK_BYTES_MAX:
        raise ValueError(f"a chunk has at most {CHUNK_BYTES_MAX} bytes, not {len(data)}")
    if _shrinks(data):
        packed = zlib.compress(data, _LEVEL)
        if len(packed) < len(data) * _WORTH:
            return _HEAD.pack(_MAGIC, _ZLIB, _sum(packed)) + packed
    return _HEAD.pack(_MAGIC, _PLAIN, _sum(data)) + data


def unpack(name: str, raw: bytes, digest: bytes) -> bytes:
    """The plain bytes. Raises BackupDamaged unless they are what `digest` says."""
    if len(raw) < _HEAD.size:
        raise damaged(name, "it is cut short")
    magic, codec, checksum = _HEAD.unpack_from(raw)
    data = raw[_HEAD.size :]
    if magic != _MAGIC:
        raise damaged(name, "it is no chunk")
    if _sum(data) != checksum:
        # Not left to the name's hash: zlib passes over some bits that changed.
        raise damaged(name, "its checksum is wrong")
    if codec == _ZLIB:
        try:
            # Bounded: what was made to do harm must not fill the memory.
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(data, CHUNK_BYTES_MAX + 1)
        except zlib.error as error:
            raise damaged(name, str(error)) from error
        if not unpacker.eof or unpacker.unused_data:
            raise damaged(name, "it is cut short, or too long")
    elif codec != _PLAIN:
        raise damaged(name, "it is packed in a way that this version does not know")
    if hash_of(data) != digest:
        raise damaged(name, "its bytes are not those that its name stands for")
    return data


class Chunks:
    """The chunks of one store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, data: bytes, *, replace: bool = False) -> tuple[bytes, int]:
        """(hash, bytes that were uploaded: 0 when it was there). `replace` uploads anyway."""
        digest = hash_of(data)
        name = chunk_name(digest)
        if not replace and self._store.exists(name):
            return digest, 0
        packed = pack(data)
        if replace:
            self._store.put(name, packed)
            return digest, len(packed)
        return digest, len(packed) if self._store.put_if_absent(name, packed) else 0

    def get(self, digest: bytes) -> bytes:
        """Raises BackupMissing, BackupDamaged."""
        name = chunk_name(digest)
        return unpack(name, self._store.get(name), digest)
