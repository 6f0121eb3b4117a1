"""The meta group's state on disk: one file, replaced whole."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import msgpack

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.meta.commands import FORMAT
from agentmem_cluster.runtime import Disk

_FILE = struct.Struct("<4sIQI")  # magic, format, bytes, checksum
_FILE_MAGIC = b"AMMS"


class MetaCorrupt(AgentMemError):
    """The checkpoint of the meta group cannot be read. The node must not start."""

    code = "meta_corrupt"


class MetaCheckpoint:
    """One state on its way to the disk: it replaces the last one whole, or not at all."""

    def __init__(self, disk: Disk, path: str, index: int, body: bytes) -> None:
        self._disk = disk
        self._path = path
        self._body = body
        self.index = index

    def run(self) -> None:
        """Raises OSError; may be run again."""
        unfinished = f"{self._path}/state.new"
        file = self._disk.open(unfinished, create=True)
        try:
            file.truncate(0)
            header = _FILE.pack(_FILE_MAGIC, FORMAT, len(self._body), crc32(self._body))
            file.pwrite(header + self._body, 0)
            file.datasync()
        finally:
            file.close()
        failpoint("meta.before_rename")
        self._disk.rename(unfinished, f"{self._path}/state")
        failpoint("meta.after_rename")
        self._disk.sync_dir(self._path)


def read_file(data: bytes) -> dict[str, Any]:
    if len(data) < _FILE.size:
        raise ValueError("it is cut short")
    magic, version, size, checksum = _FILE.unpack_from(data)
    body = data[_FILE.size :]
    if magic != _FILE_MAGIC:
        raise ValueError("it is no such file")
    if len(body) != size or crc32(body) != checksum:
        raise ValueError("its checksum is wrong")
    if version != FORMAT:
        raise ValueError(f"it is of format {version}, and this program reads {FORMAT}")
    kept = msgpack.unpackb(body)
    if not isinstance(kept, dict):
        raise ValueError("it is not a map")
    return kept
