"""A store in memory, standing in for LMDB, and histories of changes to feed it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from agentmem_node.index.source import Change, IndexDoc, Removed
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import format_ms

DIM = 8
NOW_MS = 1_750_000_000_000


def unit(values: Sequence[float]) -> npt.NDArray[np.float32]:
    vector = np.array(values, np.float32) + np.float32(1e-3)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@dataclass
class MemorySource:
    """Live memories of one shard by `doc`; `add`, `update` and `delete` answer the change."""

    dim: int = DIM
    docs: dict[int, IndexDoc] = field(default_factory=dict)
    next_doc: int = 1

    def add(
        self,
        key: int,
        content: str,
        vector: npt.NDArray[np.float32] | None,
        *,
        tenant: str = "acme",
        created_ms: int = NOW_MS - 1_000,
        expires_ms: int | None = None,
        **fields: Any,
    ) -> Change:
        """`key`: a number that becomes the id, whatever shard the memory is on."""
        memory_id = key.to_bytes(16, "big")
        memory = Memory(
            id=format_id(memory_id),
            content=content,
            created_at=format_ms(created_ms),
            updated_at=format_ms(created_ms),
            expires_at=None if expires_ms is None else format_ms(expires_ms),
            **fields,
        )
        doc = IndexDoc(
            self.next_doc,
            memory_id,
            tenant,
            memory,
            created_ms,
            created_ms,
            expires_ms,
            None if vector is None else vector.astype("<f4").tobytes(),
        )
        self.next_doc += 1
        self.docs[doc.doc] = doc
        return doc

    def update(self, doc: int, vector: npt.NDArray[np.float32] | None, **fields: Any) -> Change:
        old = self.docs[doc]
        memory = msgspec.structs.replace(old.memory, version=old.memory.version + 1, **fields)
        vector_bytes = old.vector if vector is None else vector.astype("<f4").tobytes()
        self.docs[doc] = replace(
            old, memory=memory, vector=vector_bytes, updated_ms=old.updated_ms + 1
        )
        return self.docs[doc]

    def delete(self, doc: int) -> Change:
        old = self.docs.pop(doc)
        return Removed(doc, old.id, old.tenant, old.memory.scope.owner)

    # -- what the index asks ---------------------------------------------------------------

    def scan(self, tenant: str, owner: str | None) -> Iterator[IndexDoc]:
        for number in sorted(self.docs):
            doc = self.docs.get(number)
            if doc is None or doc.tenant != tenant:
                continue
            if owner is None or doc.memory.scope.owner == owner:
                yield doc

    def count(self, tenant: str, owner: str | None) -> int:
        return sum(1 for _ in self.scan(tenant, owner))

    def vectors(self, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        rows = np.zeros((len(docs), self.dim), np.float32)
        for row, doc in enumerate(docs.tolist()):
            vector = self.docs[doc].vector
            if vector is not None:
                rows[row] = np.frombuffer(vector, "<f4")
        return rows

    def records(self, docs: Sequence[int]) -> list[bytes]:
        return [msgspec.json.encode(self.docs[doc].memory) for doc in docs]

    def memory(self, doc: int) -> dict[str, Any]:
        return msgspec.to_builtins(self.docs[doc].memory)


WORDS = [
    "tea",
    "teas",
    "garden",
    "river",
    "bees",
    "honey",
    "letter",
    "Oslo",
    "train",
    "July",
    "the",
]
texts = st.lists(st.sampled_from(WORDS), min_size=0, max_size=8).map(" ".join)
vectors = st.lists(st.floats(-1, 1, width=32), min_size=DIM, max_size=DIM).map(unit)
maybe_vectors = st.one_of(vectors, vectors, vectors, st.none())


@pytest.fixture
def source() -> MemorySource:
    return MemorySource()
