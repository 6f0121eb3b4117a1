"""A block's share of the text engine: filled when a phrase or a misspelt word is first sought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from agentmem_node.index.analysis import words
from agentmem_node.index.block import Block
from agentmem_node.index.derived import ReadMemory
from agentmem_node.index.text_engine import TextEngine

# Fewer memories are read and compared one by one: that takes a millisecond or two.
_MEMORIES_MIN: Final = 256
_STEP_DOCS: Final = 64


class TextSpaces:
    """Opens, fills and drops the spaces of one shard's blocks."""

    def __init__(self, engine: TextEngine | None, read: ReadMemory) -> None:
        self.engine = engine
        self._read = read
        self._fillings: dict[Block, Iterator[None]] = {}

    def needs_fill(self, block: Block) -> bool:
        """Whether a search for phrases would first spend noticeable time."""
        if self.engine is None or block.columns.live < _MEMORIES_MIN:
            return False
        return block.text_space is None or not self.engine.is_settled(block.text_space)

    def fill(self, block: Block) -> None:
        """Have the block's texts in the engine or its tail, now."""
        if self.engine is not None and block.columns.live >= _MEMORIES_MIN:
            while block.text_space is None:
                self._step(block)

    def fill_steps(self, block: Block) -> Iterator[None]:
        """The same in steps of a few milliseconds, until they are committed too."""
        while self.needs_fill(block):
            if block.text_space is None:
                self._step(block)
            yield

    def drop(self, block: Block) -> None:
        """The block is forgotten."""
        filling = self._fillings.pop(block, None)
        if filling is not None:
            next(filling, None)
        block.on_text = None
        if self.engine is not None and block.text_space is not None:
            self.engine.drop_space(block.text_space)
            block.text_space = None

    def _step(self, block: Block) -> None:
        filling = self._fillings.get(block)
        if filling is None:
            filling = self._fillings[block] = self._fill(block)
        next(filling, None)

    def _fill(self, block: Block) -> Iterator[None]:
        engine = self.engine
        assert engine is not None
        space = engine.open_space()

        def on_text(doc: int, text: str | None) -> None:
            if text is None:
                engine.remove(space, doc)
            else:
                engine.put(space, doc, words(text))

        # From now on changes are forwarded; what was there before is read here. A memory that
        # comes both ways is put twice, with the same text.
        block.on_text = on_text
        columns = block.columns
        docs = columns.live_docs()
        for start in range(0, len(docs), _STEP_DOCS):
            for doc in docs[start : start + _STEP_DOCS]:
                row = columns.row_of(doc)
                if row is not None and columns.is_live[row]:
                    on_text(doc, self._read(doc)["content"])
            yield
            if block not in self._fillings:  # dropped meanwhile
                engine.drop_space(space)
                return
        del self._fillings[block]
        block.text_space = space
