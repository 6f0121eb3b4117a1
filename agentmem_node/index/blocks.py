"""The blocks that a shard holds in memory: made in small steps, kept current, forgotten by use.

A block is built from a scan of the store that may take seconds for a large tenant. It is done in
steps, between which the node does other work and entries are applied; what changes meanwhile is
noted and applied to the block at the end. The scan may have seen a change already or not: putting
a memory twice, or removing one that is not there, makes no difference.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final

from agentmem_node.index.analysis import analyzer
from agentmem_node.index.block import Block
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.source import Change, IndexDoc, Removed, Source

_log = logging.getLogger(__name__)

BlockKey = tuple[str, str | None, str]
"""tenant, owner (None: the whole tenant), language."""

# About 2 ms of work.
_STEP_DOCS: Final = 64
# A block of fewer memories is built at once: waiting would cost more than it saves.
_AT_ONCE_DOCS: Final = 128
_NOTED_MAX: Final = 100_000
BLOCKS_BYTES_MAX_DEFAULT: Final = 2 << 30


class BlockBudget:
    """The memory that blocks of all shards of a node may take together; the block that was not
    used for longest goes first."""

    def __init__(self, bytes_max: int = BLOCKS_BYTES_MAX_DEFAULT) -> None:
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self._blocks: OrderedDict[Block, tuple[int, Callable[[], None]]] = OrderedDict()

    def put(self, block: Block, forget: Callable[[], None]) -> None:
        """A block was built, or has grown. Others are forgotten to make room, never itself."""
        size = block.bytes_used()
        self.drop(block)
        self._blocks[block] = (size, forget)
        self.bytes_used += size
        while self.bytes_used > self.bytes_max and len(self._blocks) > 1:
            oldest, (_, forget_oldest) = next(iter(self._blocks.items()))
            self.drop(oldest)
            forget_oldest()

    def used(self, block: Block) -> None:
        self._blocks.move_to_end(block)

    def drop(self, block: Block) -> None:
        size, _ = self._blocks.pop(block, (0, None))
        self.bytes_used -= size


class Blocks:
    """The blocks of one shard."""

    def __init__(
        self,
        source: Source,
        dim: int,
        defaults: RankingDefaults,
        budget: BlockBudget,
        on_forget: Callable[[Block], None],
    ) -> None:
        self._source = source
        self._dim = dim
        self._defaults = defaults
        self._budget = budget
        self._on_forget = on_forget
        self._ready: dict[BlockKey, Block] = {}
        # (tenant, owner or None) -> keys that changes of it concern, one a language.
        self._keys_of: dict[tuple[str, str | None], set[BlockKey]] = {}
        # Blocks under construction, each with the changes since its scan began.
        self._noted: dict[BlockKey, list[Change]] = {}
        self._builds: dict[BlockKey, Iterator[None]] = {}
        self.forgotten = 0

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
        self._budget.used(block)
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
        if not self._keys_of:
            return
        concerned: dict[tuple[str, str | None], list[Change]] = {}
        for change in changes:
            owner = change.owner if isinstance(change, Removed) else change.memory.scope.owner
            scopes: tuple[tuple[str, str | None], ...] = (
                (change.tenant, owner),
                (change.tenant, None),
            )
            for scope in scopes:
                if scope in self._keys_of:
                    concerned.setdefault(scope, []).append(change)
        for scope, mine in concerned.items():
            # A block that grows may push another out.
            for key in tuple(self._keys_of.get(scope, ())):
                if key in self._ready:
                    self._apply(key, mine)
                elif key in self._noted:
                    self._note(key, mine)

    def close(self) -> None:
        for build in tuple(self._builds.values()):
            _end(build)
        for key, block in tuple(self._ready.items()):
            self._budget.drop(block)
            self._forget(key)

    def _build(self, key: BlockKey) -> Iterator[None]:
        tenant, owner, language = key
        noted = self._noted[key] = []
        self._keys_of.setdefault((tenant, owner), set()).add(key)
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
            self._budget.put(block, partial(self._forget, key))
        finally:
            del self._noted[key], self._builds[key]
            if key not in self._ready:
                self._unlist(key)

    def _apply(self, key: BlockKey, changes: Sequence[Change]) -> None:
        block = self._ready[key]
        size = block.columns.capacity
        try:
            apply_changes(block, changes)
        except Exception:
            # The store has the change. A block that could not take it in must not stop the shard,
            # nor answer with half of it: the next search builds it afresh.
            _log.exception("The search block %s is built afresh: it could not take a change.", key)
            self._budget.drop(block)
            self._forget(key)
            return
        if block.columns.capacity != size:
            self._budget.put(block, partial(self._forget, key))

    def _note(self, key: BlockKey, changes: Sequence[Change]) -> None:
        noted = self._noted[key]
        noted += changes
        if len(noted) > _NOTED_MAX:
            # Nobody drives this construction any more, or it cannot keep up: begin again later.
            _end(self._builds[key])

    def _forget(self, key: BlockKey) -> None:
        self.forgotten += 1
        self._on_forget(self._ready.pop(key))
        self._unlist(key)

    def _unlist(self, key: BlockKey) -> None:
        keys = self._keys_of[key[0], key[1]]
        keys.discard(key)
        if not keys:
            del self._keys_of[key[0], key[1]]


def _end(build: Iterator[None]) -> None:
    if isinstance(build, Generator):
        build.close()


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
