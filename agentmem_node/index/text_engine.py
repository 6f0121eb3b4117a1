"""The node's one tantivy index: which memories may hold a phrase, or a word like one misspelt.

It only proposes. What it proposes is checked against the stored text and scored by our own rules
(`agentmem_node.index.text_legs`), so that neither its segments nor the moment of its commits
decide a result. One index for all shards of a node: sixteen writers would cost 112 threads.

Writes are queued and committed by a thread of its own (a commit takes about 10 ms). Until then
they are the tail: memories that a search must look at itself. So an acknowledged memory is found
at once. The folder holds nothing that is needed after a restart: it is emptied when opened.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import tantivy

_log = logging.getLogger(__name__)

_HEAP_BYTES: Final = 32 << 20  # tantivy wants at least 15 MB for a writer
_COMMIT_WAIT_S: Final = 0.05  # between a write and its commit: others join it
# Proposals of one search: the newest memories of a shard that may match.
CANDIDATES_MAX: Final = 2_000

# Documents that a search may look at itself without being noticeably slower.
_TAIL_GOOD: Final = 200

_ADD: Final = 0
_REMOVE: Final = 1
_DROP: Final = 2


class _Write(NamedTuple):
    kind: int
    space: int
    doc: int
    words: str


class Term(NamedTuple):
    """A word sought: exactly (distance 0), or with so many letters changed, lost or swapped."""

    word: str
    distance: int


class TextEngine:
    """Spaces of documents. All methods are for the thread that owns the indexes."""

    def __init__(self, path: Path | None) -> None:
        builder = tantivy.SchemaBuilder()
        builder.add_text_field("key", tokenizer_name="raw", index_option="basic")
        builder.add_unsigned_field("space", indexed=True)
        builder.add_unsigned_field("doc", fast=True)
        builder.add_text_field("words", tokenizer_name="whitespace", index_option="position")
        self._schema = builder.build()
        if path is None:
            self._index = tantivy.Index(self._schema)
        else:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            self._index = tantivy.Index(self._schema, path=str(path))
        self._tails: dict[int, dict[int, int]] = {}  # space -> doc -> number of its last write
        self._spaces_made = 0
        self._written = 0
        # Shared with the committing thread, under the lock:
        self._lock = threading.Lock()
        self._queue: list[_Write] = []
        self._committed = 0  # writes up to this number are seen by searches
        self._failure: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- writing ------------------------------------------------------------------------

    def open_space(self) -> int:
        self._spaces_made += 1
        self._tails[self._spaces_made] = {}
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._commit_loop, name="text-commit", daemon=True
            )
            self._thread.start()
        return self._spaces_made

    def put(self, space: int, doc: int, words: Sequence[str]) -> None:
        """A document, or its next version."""
        self._write(_Write(_ADD, space, doc, " ".join(words)))

    def remove(self, space: int, doc: int) -> None:
        self._write(_Write(_REMOVE, space, doc, ""))

    def drop_space(self, space: int) -> None:
        del self._tails[space]
        self._write(_Write(_DROP, space, 0, ""))

    def close(self) -> None:
        """End the committing thread; what it has not committed is not needed any more."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _write(self, write: _Write) -> None:
        self._written += 1
        tail = self._tails.get(write.space)
        if tail is not None:
            tail.pop(write.doc, None)  # so that the order of the dictionary is that of the writes
            tail[write.doc] = self._written
        with self._lock:
            self._queue.append(write)
        self._wake.set()

    # -- searching ----------------------------------------------------------------------

    @property
    def documents(self) -> int:
        return int(self._index.searcher().num_docs)

    @property
    def pending(self) -> int:
        """Writes that are not committed yet."""
        with self._lock:
            return self._written - self._committed

    def tail(self, space: int) -> list[int]:
        """Docs of a space written since the last commit: a search must look at them itself."""
        self._cut_tail(space)
        return list(self._tails[space])

    def is_settled(self, space: int) -> bool:
        """Whether the tail is as short as a search likes it, or will not get shorter."""
        self._cut_tail(space)
        return len(self._tails[space]) <= _TAIL_GOOD or self._failure is not None

    def _cut_tail(self, space: int) -> None:
        with self._lock:
            committed = self._committed
        tail = self._tails[space]
        while tail:
            doc, number = next(iter(tail.items()))
            if number > committed:
                return
            del tail[doc]

    def with_phrases(self, space: int, phrases: Sequence[Sequence[str]]) -> list[int]:
        """Committed docs that have at least one of the phrases (of one word or more)."""
        return self._search(
            space,
            [
                tantivy.Query.phrase_query(self._schema, "words", list(phrase))
                if len(phrase) > 1
                else tantivy.Query.term_query(self._schema, "words", phrase[0])
                for phrase in phrases
            ],
        )

    def with_terms(self, space: int, terms: Sequence[Term]) -> list[int]:
        """Committed docs that have at least one of the words, or one like it."""
        return self._search(
            space,
            [
                tantivy.Query.fuzzy_term_query(self._schema, "words", term.word, term.distance)
                if term.distance
                else tantivy.Query.term_query(self._schema, "words", term.word)
                for term in terms
            ],
        )

    def _search(self, space: int, either: Sequence[Any]) -> list[int]:
        if not either:
            return []
        self._cut_tail(space)
        # Docs in the tail may be found in an old version, and are looked at anyway.
        limit = CANDIDATES_MAX + len(self._tails[space])
        query = tantivy.Query.boolean_query(
            [
                (tantivy.Occur.Must, tantivy.Query.term_query(self._schema, "space", space)),
                (
                    tantivy.Occur.Must,
                    tantivy.Query.boolean_query([(tantivy.Occur.Should, q) for q in either]),
                ),
            ]
        )
        found = self._index.searcher().search(query, limit=limit, count=False, order_by_field="doc")
        return [doc for doc, _ in found.hits]

    # -- the committing thread ----------------------------------------------------------

    def _commit_loop(self) -> None:
        try:
            writer = self._index.writer(heap_size=_HEAP_BYTES, num_threads=1)
            while not self._stop.is_set():
                self._wake.wait()
                self._stop.wait(_COMMIT_WAIT_S)
                self._wake.clear()
                with self._lock:
                    writes, self._queue = self._queue, []
                if writes and not self._stop.is_set():
                    for write in writes:
                        self._perform(writer, write)
                    writer.commit()
                    self._index.reload()
                    with self._lock:
                        self._committed += len(writes)
            # Merges under way end before the folder may be deleted.
            writer.wait_merging_threads()
        except BaseException as error:
            # A full disk, most likely; a panic in tantivy is a BaseException. Searches go on:
            # everything since is in the tail.
            self._failure = str(error)
            _log.warning(
                "The index for phrases and misspelt words stopped: %s. These searches get slower "
                "until the node is started again.",
                error,
            )

    def _perform(self, writer: Any, write: _Write) -> None:
        if write.kind == _DROP:
            writer.delete_documents_by_query(
                tantivy.Query.term_query(self._schema, "space", write.space)
            )
            return
        key = f"{write.space}:{write.doc}"
        writer.delete_documents_by_term("key", key)
        if write.kind == _ADD:
            document = tantivy.Document()
            document.add_text("key", key)
            document.add_unsigned("space", write.space)
            document.add_unsigned("doc", write.doc)
            document.add_text("words", write.words)
            writer.add_document(document)
