"""The seam between a shard's truth (LMDB) and its derived index.

The index learns of every applied change in order and can ask the store for anything again: it
holds nothing that cannot be rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agentmem_node.model.memory import Memory


@dataclass(frozen=True, slots=True)
class IndexDoc:
    """One live memory. `doc` is its shard-local number: given at the first add, kept over updates,
    increasing, never reused."""

    doc: int
    id: bytes  # 16 bytes, time-ordered
    tenant: str
    memory: Memory
    created_ms: int
    updated_ms: int
    expires_ms: int | None
    vector: bytes | None  # float32 little-endian, L2-normalised


@dataclass(frozen=True, slots=True)
class Removed:
    doc: int
    id: bytes
    tenant: str
    owner: str


Change = IndexDoc | Removed  # an IndexDoc whose `doc` is known replaces it


class Source(Protocol):
    """Reads of one shard, consistent with the last applied batch."""

    dim: int  # 0: lexical only

    def scan(self, tenant: str, owner: str | None) -> Iterator[IndexDoc]:
        """Live memories of an owner (`"user:ana"`), or of the whole tenant, in `doc` order."""
        ...

    def count(self, tenant: str, owner: str | None) -> int: ...

    def vectors(self, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shape (len(docs), dim); zeros where a memory has none."""
        ...

    def records(self, docs: Sequence[int]) -> list[bytes]:
        """Stored JSON objects, in the order asked."""
        ...

    def memory(self, doc: int) -> dict[str, Any]: ...
