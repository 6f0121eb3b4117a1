"""Tenants and owners: a small number for each name, and how many live memories each has."""

from __future__ import annotations

from typing import Final

from agentmem_node.storage.environment import Environment
from agentmem_node.storage.layout import SCOPE_HEAD, U32, State, name_hash

_TENANTS: Final = 0
# A name costs about 300 bytes here; a shard that serves more owners at once reads them again.
_CACHED_MAX: Final = 16_384


class Scope:
    """A tenant, or an owner of a tenant. `memories` counts those that live."""

    __slots__ = ("key", "memories", "name", "number")

    def __init__(self, key: bytes, number: int, memories: int, name: str) -> None:
        self.key = key
        self.number = number
        self.memories = memories
        self.name = name


class Scopes:
    """Rows of `scopes`, kept in memory while an entry is applied and written by `flush`."""

    def __init__(self, env: Environment, state: State) -> None:
        self._env = env
        self._state = state
        self._db = env.db["scopes"]
        self._cache: dict[tuple[int, str], Scope] = {}
        self._touched: set[Scope] = set()

    def tenant(self, name: str) -> Scope | None:
        return self.find(_TENANTS, name)

    def make_tenant(self, name: str) -> Scope:
        return self.make(_TENANTS, name)

    def find(self, tenant: int, name: str) -> Scope | None:
        """An owner of a tenant. The tenant's own scope for the name ''."""
        found = self._cache.get((tenant, name))
        if found is None:
            key = U32.pack(tenant) + name_hash(name)
            row = self._env.txn.get(key, db=self._db)
            if row is None:
                return None
            number, memories = SCOPE_HEAD.unpack_from(row)
            found = Scope(key, number, memories, name)
            self._remember(tenant, found)
        return found

    def make(self, tenant: int, name: str) -> Scope:
        """`find`, or a new scope with the next number."""
        found = self.find(tenant, name)
        if found is None:
            key = U32.pack(tenant) + name_hash(name)
            found = Scope(key, self._state.next_scope, 0, name)
            self._state.next_scope += 1
            self._touched.add(found)
            self._remember(tenant, found)
        return found

    def count(self, scope: Scope, change: int) -> None:
        scope.memories += change
        self._touched.add(scope)

    def flush(self) -> None:
        """Write what changed. After it, the cache may be dropped."""
        for scope in self._touched:
            row = SCOPE_HEAD.pack(scope.number, scope.memories) + scope.name.encode()
            self._env.txn.put(scope.key, row, db=self._db)
        self._touched.clear()
        if len(self._cache) > _CACHED_MAX:
            self._cache.clear()

    def forget(self) -> None:
        """Read everything again: the rows were changed behind this cache."""
        self._touched.clear()
        self._cache.clear()

    def _remember(self, tenant: int, scope: Scope) -> None:
        self._cache[tenant, scope.name] = scope
