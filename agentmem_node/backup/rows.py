"""What a fetched shard holds of one tenant, of one owner, or of everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agentmem_node.backup.content import Row, rows
from agentmem_node.backup.errors import BackupDamaged
from agentmem_node.model.records import decode_memory
from agentmem_node.storage.checkpoint import StorageDamaged
from agentmem_node.storage.store import Store


class FetchedShard:
    """A shard that `fetch_shard` has put into `folder`. One thread only; `close` it."""

    def __init__(self, folder: Path, dim: int) -> None:
        """Raises BackupDamaged."""
        try:
            self._store = Store.open(folder, dim=dim)
        except StorageDamaged as error:
            raise BackupDamaged(error.message) from error

    def close(self) -> None:
        self._store.env.close()

    def rows(self, tenant: str | None = None, owner: str | None = None) -> Iterator[Row]:
        """Live and deleted memories with their past. `owner` ("user:ana") needs its `tenant`."""
        env = self._store.env
        if tenant is None:
            yield from rows(env.txn, env.db)
            return
        scope = self._store.scopes.tenant(tenant)
        if scope is None:
            return
        for row in rows(env.txn, env.db, scope.number):
            if owner is None or owner_of(row) == owner:
                yield row


def owner_of(row: Row) -> str:
    """Whose memory it is, or was: the newest record that is left says so."""
    records = [past.record for past in row.past if past.record]
    record = row.live.record if row.live is not None else records[-1] if records else b""
    memory = decode_memory(record)
    return "" if memory is None else memory.scope.owner
