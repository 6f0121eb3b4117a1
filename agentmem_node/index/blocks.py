"""The blocks that a shard holds in memory: made in small steps, kept current, forgotten by use.

A block is built from a scan of the store that may take seconds for a large tenant. It is done in
steps, between which the node does other work and entries are applied; what changes meanwhile is
noted and applied to the block at the end. The scan may have seen a change already or not: putting
a memory twice, or removing one that is not there, makes no difference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from agentmem_node.index.analysis import analyzer
from agentmem_node.index.block import Block
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.source import Change, IndexDoc, Removed, Source

BlockKey = tuple[str, str | None, str]
"""tenant, owner (None: the whole tenant), language."""

# About 2 ms of work.
_STEP_DOCS: Final = 64
# A block of fewer memories is built at once: waiting would cost more than it saves.
_AT_ONCE_DOCS: Final = 128


class Blocks:
    def __init__(
        self,
        source: Source,
        dim: int,
        defaults: RankingDefaults,
        bytes_max: int,
        on_evict: Callable[[Block], None],
    ) -> None:
        self._on_evict = on_evict
        self._source = source
        self._dim = dim
        self._defaults = defaults
        self._bytes_max = bytes_max
        self._ready: OrderedDict[BlockKey, Block] = OrderedDict()
        self._of_tenant: dict[str, set[BlockKey]] = {}
        # Blocks under construction, each with the changes since its scan began.
        self._noted: dict[BlockKey, list[Change]] = {}
        self._builds: dict[BlockKey, Iterator[None]] = {}
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def bytes_used(self) -> int:
        return sum(block.bytes_used() for block in self._ready.values())

    def get(self, key: BlockKey) -> Block:
        """The block, built to its end now if need be."""
        block = self._ready.get(key)
        if block is None:
            for _ in self.build_steps(key):
                pass
            block = self._ready[key]
        self._ready.move_to_end(key)
        return block

    def needs_build(self, key: BlockKey) -> bool:
        """Whether `get` would take noticeable time."""
        if key in self._ready:
            return False
        tenant, owner, _ = key
        return key in self._builds or self._source.count(tenant, owner) > _AT_ONCE_DOCS

    def build_steps(self, key: BlockKey) -> Iterator[None]:
        """Steps of a few milliseconds, after the last of which the block is there.

        Several searches may wait for the same block: each drives the one construction further.
        """
        while key not in self._ready:
            build = self._builds.get(key)
            if build is None:
                build = self._builds[key] = self._build(key)
            next(build, None)
            yield

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in what was just applied to the store, in order."""
        if not self._of_tenant:
            return
        by_owner: dict[tuple[str, str], list[Change]] = {}
        by_tenant: dict[str, list[Change]] = {}
        for change in changes:
            owner = change.owner if isinstance(change, Removed) else change.memory.scope.owner
            by_owner.setdefault((change.tenant, owner), []).append(change)
            by_tenant.setdefault(change.tenant, []).append(change)
        for tenant, all_of_it in by_tenant.items():
            for key in self._of_tenant.get(tenant, ()):
                owner_of_block = key[1]
                if owner_of_block is None:
                    mine = all_of_it
                else:
                    mine = by_owner.get((tenant, owner_of_block), [])
                if not mine:
                    continue
                if key in self._noted:
                    self._noted[key] += mine
                else:
                    apply_changes(self._ready[key], mine)

    def _build(self, key: BlockKey) -> Iterator[None]:
        tenant, owner, language = key
        noted = self._noted[key] = []
        self._of_tenant.setdefault(tenant, set()).add(key)
        try:
            block = Block(self._dim, analyzer(language), self._defaults)
            block.reserve(self._source.count(tenant, owner))
            docs = self._source.scan(tenant, owner)
            while part := list(islice(docs, _STEP_DOCS)):
                block.put(part)
                block.postings.merge_if_long()
                yield
            block.postings.merge()
            apply_changes(block, noted)
            self._ready[key] = block
            self._evict(newest=key)
        finally:
            del self._noted[key], self._builds[key]
            if key not in self._ready:
                self._of_tenant[tenant].discard(key)

    def _evict(self, newest: BlockKey) -> None:
        """Forget the blocks that were not used for longest, never the newest."""
        total = self.bytes_used
        while total > self._bytes_max and len(self._ready) > 1:
            key = next(iter(self._ready))
            if key == newest:
                return
            block = self._ready.pop(key)
            total -= block.bytes_used()
            self._on_evict(block)
            self._of_tenant[key[0]].discard(key)
            self.evicted += 1


def apply_changes(block: Block, changes: Sequence[Change]) -> None:
    puts: list[IndexDoc] = []
    for change in changes:
        if isinstance(change, IndexDoc):
            puts.append(change)
            continue
        if puts:
            block.put(puts)
            puts = []
        block.remove(change.doc)
    if puts:
        block.put(puts)
