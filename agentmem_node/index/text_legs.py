"""The phrase and fuzzy legs: what a text must hold, and how well it does, from the text alone.

phrase: how much of the longest stretch of the query's words stands in the memory, in their order
and side by side. With "quoted phrases" in the query, only whole ones count.
fuzzy: how many of the query's words the memory has, a misspelt one counting less.
Both count words that are no stop words, as a share of the query's: scores are from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from agentmem_node.index.analysis import Analyzer, words
from agentmem_node.index.block import Block
from agentmem_node.index.columns import Bools, Floats
from agentmem_node.index.derived import ReadMemory
from agentmem_node.index.text_engine import Term, TextEngine

_QUOTED: Final = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»')
# Words of a query that these legs look at: each costs a query of its own.
_WORDS_MAX: Final = 32
# Letters of a word from which one, then two, may be wrong.
_ONE_WRONG_FROM: Final = 4
_TWO_WRONG_FROM: Final = 8


class Phrase(NamedTuple):
    words: tuple[str, ...]
    counts: tuple[int, ...]  # of each word: 1, or 0 for a stop word
    is_whole: bool  # quoted: all of it, or nothing


@dataclass(frozen=True, slots=True)
class TextQuery:
    """What the two legs seek."""

    phrases: tuple[Phrase, ...]
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, text: str, analyzer: Analyzer) -> TextQuery:
        quoted = [words(next(filter(None, m))) for m in _QUOTED.findall(text)]
        whole = words(text)[:_WORDS_MAX]
        phrases = [_phrase(q[:_WORDS_MAX], analyzer, is_whole=True) for q in quoted if q]
        if not phrases and whole:
            phrases = [_phrase(whole, analyzer, is_whole=False)]
        content = [word for word in dict.fromkeys(whole) if analyzer.key(word)]
        return cls(tuple(phrases), tuple(Term(word, _wrong(word)) for word in content))


def phrase_scores(
    block: Block,
    query: TextQuery,
    engine: TextEngine | None,
    within: Bools | None,
    read: ReadMemory,
) -> Floats:
    """The phrase leg of every row; only rows `within` (None: all) are looked at."""
    share = sum(sum(p.counts) for p in query.phrases)
    docs = None
    if engine is not None and block.text_space is not None:
        sought = [part for phrase in query.phrases for part in _proposals(phrase)]
        docs = engine.with_phrases(block.text_space, sought)

    def score(text: Sequence[str]) -> float:
        return sum(best_stretch(phrase, text) for phrase in query.phrases) / share

    return _scores(block, docs if share else [], engine, within, read, score)


def fuzzy_scores(
    block: Block,
    query: TextQuery,
    engine: TextEngine | None,
    within: Bools | None,
    read: ReadMemory,
) -> Floats:
    """The fuzzy leg of every row; only rows `within` (None: all) are looked at."""
    docs = None
    if engine is not None and block.text_space is not None:
        docs = engine.with_terms(block.text_space, query.terms)
    known: dict[tuple[str, str], float] = {}

    def likeness(term: Term, word: str) -> float:
        found = known.get((term.word, word))
        if found is None:
            found = known[term.word, word] = alike(term, word)
        return found

    def score(text: Sequence[str]) -> float:
        distinct = set(text)
        total = 0.0
        for term in query.terms:
            total += (
                1.0
                if term.word in distinct
                else max((likeness(term, word) for word in distinct), default=0.0)
            )
        return total / len(query.terms)

    return _scores(block, docs if query.terms else [], engine, within, read, score)


def best_stretch(phrase: Phrase, text: Sequence[str]) -> int:
    """Words that count, in the longest stretch of the phrase found in the text; two words at
    least, one of which counts (a quoted phrase: all of it)."""
    sought, counts = phrase.words, phrase.counts
    best = 0
    for start in range(len(sought)):
        if phrase.is_whole and start:
            break
        at = -1
        for _ in range(text.count(sought[start])):
            at = text.index(sought[start], at + 1)
            length = 1
            while (
                start + length < len(sought)
                and at + length < len(text)
                and sought[start + length] == text[at + length]
            ):
                length += 1
            if length == len(sought) if phrase.is_whole else length >= min(2, len(sought)):
                best = max(best, sum(counts[start : start + length]))
    return best


def alike(term: Term, word: str) -> float:
    """1 for the same word, less for each letter changed, lost, added or swapped with the next;
    0 when there are more of these than the term allows."""
    sought, limit = term
    if sought == word:
        return 1.0
    if abs(len(sought) - len(word)) > limit:
        return 0.0
    before: list[int] = []
    row = list(range(len(word) + 1))
    for i, letter in enumerate(sought, start=1):
        older, before = before, row
        row = [i]
        for j, other in enumerate(word, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == word[j - 2] and sought[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        if min(row) > limit:
            return 0.0
    return 1.0 - row[-1] / len(sought) if row[-1] <= limit else 0.0


def _scores(
    block: Block,
    docs: Sequence[int] | None,
    engine: TextEngine | None,
    within: Bools | None,
    read: ReadMemory,
    score: Callable[[Sequence[str]], float],
) -> Floats:
    """Scores of the docs proposed (None: of all) and of the tail."""
    columns = block.columns
    found: Floats = np.zeros(columns.n)
    live = columns.is_live[: columns.n]
    if docs is None:
        rows = np.flatnonzero(live if within is None else within).tolist()
    else:
        tail = engine.tail(block.text_space) if engine and block.text_space is not None else []
        rows = [row for doc in {*docs, *tail} if (row := columns.row_of(doc)) is not None]
    rows = [row for row in rows if live[row] and (within is None or within[row])]
    for row, doc in zip(rows, columns.docs(np.array(rows, dtype=np.int64)), strict=True):
        found[row] = score(words(read(doc)["content"]))
    return found


def _phrase(sought: Sequence[str], analyzer: Analyzer, *, is_whole: bool) -> Phrase:
    counts = tuple(int(analyzer.key(word) != 0) for word in sought)
    if is_whole and not any(counts):
        counts = (1,) * len(sought)  # "to be or not to be": quoted, so it is meant
    return Phrase(tuple(sought), counts, is_whole)


def _proposals(phrase: Phrase) -> list[tuple[str, ...]]:
    """Phrases one of which every text with a score has."""
    if phrase.is_whole or len(phrase.words) == 1:
        return [phrase.words]
    pairs = zip(phrase.words, phrase.words[1:], strict=False)
    counts = zip(phrase.counts, phrase.counts[1:], strict=False)
    return [pair for pair, count in zip(pairs, counts, strict=True) if any(count)]


def _wrong(word: str) -> int:
    return (len(word) >= _ONE_WRONG_FROM) + (len(word) >= _TWO_WRONG_FROM)
