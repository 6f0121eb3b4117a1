"""What the derived indexes may ask of a shard's store: `agentmem_node.index.source.Source`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from agentmem_node.index.source import IndexDoc
from agentmem_node.model.memory import Memory
from agentmem_node.model.records import decode_memory
from agentmem_node.storage.layout import DocRow
from agentmem_node.storage.scopes import Scope
from agentmem_node.storage.store import Store

_any_decoder: Final[msgspec.json.Decoder[dict[str, Any]]] = msgspec.json.Decoder(dict[str, Any])


class StoreSource:
    """A `Source` over a store: to be used on the thread that applies."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.dim = store.state.dim

    def scan(self, tenant: str, owner: str | None) -> Iterator[IndexDoc]:
        """Live memories in `doc` order. Entries may be applied while it is consumed: what they
        change is seen or not, and is told to the index anyway."""
        store = self._store
        with store.reading:
            scope = scope_of(store, tenant, owner)
            docs = [] if scope is None else store.docs_of(scope.number).tolist()
        for doc in docs:
            assert scope is not None
            with store.reading:
                row = store.of_scope(doc, scope.number)
                vector = None if row is None else store.vector(doc)
            if row is not None:
                yield index_doc(doc, tenant, row, vector)

    def count(self, tenant: str, owner: str | None) -> int:
        scope = scope_of(self._store, tenant, owner)
        return 0 if scope is None else scope.memories

    def vectors(self, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with self._store.reading:
            return self._store.vectors(docs.tolist())

    def records(self, docs: Sequence[int]) -> list[bytes]:
        return [self._record(doc) for doc in docs]

    def memory(self, doc: int) -> dict[str, Any]:
        return _any_decoder.decode(self._record(doc))

    def _record(self, doc: int) -> bytes:
        with self._store.reading:
            record = self._store.record(doc)
        if record is None:
            raise KeyError(f"memory number {doc} is deleted, or never was")
        return record


def scope_of(store: Store, tenant: str, owner: str | None) -> Scope | None:
    """An owner of a tenant, or the tenant itself for None."""
    found = store.scopes.tenant(tenant)
    if found is None or not owner:
        return found
    return store.scopes.find(found.number, owner)


def index_doc(doc: int, tenant: str, row: DocRow, vector: bytes | None) -> IndexDoc:
    return IndexDoc(
        doc,
        row.id,
        tenant,
        memory_of(row),
        row.created_ms,
        row.updated_ms,
        row.expires_ms,
        vector,
    )


def memory_of(row: DocRow) -> Memory:
    memory = decode_memory(row.record)
    if memory is None:
        raise AssertionError("a record was checked when it was applied, but is not a memory now")
    return memory
