"""From text to terms: lower-cased words without stop words, stemmed, as 64-bit keys.

A key is a hash of the stem: an index block then holds no strings (strings and a dictionary per
owner cost more memory than the vectors), and shards can merge their counts without agreeing on
numbers first. Two of a million stems share a key with a probability of 3e-8.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from py_rust_stemmers import SnowballStemmer

from agentmem_node.index import date_terms

_WORD: Final = re.compile(r"\w+")
# Scripts without spaces between words: cut into pairs of characters, as Lucene does.
_UNSPACED: Final = re.compile(
    "[\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)
# Words seen recently, so that most need no stemming; a dictionary of this size stays below 10 MB.
_CACHE_WORDS_MAX: Final = 65_536

# Lucene's and the question words and pronouns of conversations, which say who speaks, not what of.
_STOP_WORDS_EN: Final = """
    a an and are as at be but by for if in into is it no not of on or such that the their then
    there these they this to was will with i me my we our you your he him his she her its them
    what which who whom when where why how do does did has have had been being am were would could
    should can may might about from s t d ll re ve m so than too very just also
"""

_SNOWBALL: Final[Mapping[str, str]] = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english",
    "es": "spanish", "fi": "finnish", "fr": "french", "hu": "hungarian", "it": "italian",
    "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian", "ru": "russian",
    "sv": "swedish", "ta": "tamil", "tr": "turkish",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Lower-cased words in order, stop words included.

    >>> words("Ana's cat, 2nd floor")
    ['ana', 's', 'cat', '2nd', 'floor']
    >>> words("東京都 Tokyo")
    ['東京', '京都', 'tokyo']
    """
    found = _WORD.findall(text.lower())
    if text.isascii() or _UNSPACED.search(text) is None:
        return found
    return [part for word in found for part in _parts(word)]


def _parts(word: str) -> list[str]:
    parts = []
    end = 0
    for run in _UNSPACED.finditer(word):
        if run.start() > end:
            parts.append(word[end : run.start()])
        characters = run.group()
        parts += [characters[i : i + 2] for i in range(max(len(characters) - 1, 1))]
        end = run.end()
    if end < len(word):
        parts.append(word[end:])
    return parts


class Analyzer:
    """One language's words, stop words and stems. Unknown languages have neither of the latter."""

    def __init__(self, language: str) -> None:
        name = _SNOWBALL.get(language)
        self._stem = SnowballStemmer(name).stem_word if name else None
        self._stop_words = frozenset(_STOP_WORDS_EN.split() if language == "en" else ())
        self._keys: dict[str, int] = {}

    def keys(self, text: str) -> list[int]:
        """The keys of a text's terms, in order, repetitions included; none of its stop words."""
        known = self._keys
        keys = []
        for word in words(text):
            key = known.get(word)
            if key is None:
                key = self._learn(word)
            if key:
                keys.append(key)
        return keys

    def key(self, word: str) -> int:
        """The key of one lower-cased word; 0 for a stop word."""
        key = self._keys.get(word)
        return self._learn(word) if key is None else key

    def date_keys(self, created_ms: int) -> list[int]:
        """The keys of the terms that say when a memory was made."""
        return [self.key(term) for term in date_terms.document_terms(created_ms)]

    def _learn(self, word: str) -> int:
        if len(self._keys) >= _CACHE_WORDS_MAX:
            self._keys.clear()
        if word in self._stop_words:
            key = 0
        else:
            # A term of a date ("@m7") is not a word and has no stem.
            stem = self._stem(word) if self._stem and word[0] != "@" else word
            digest = hashlib.blake2b(stem.encode("utf-8", "surrogatepass"), digest_size=8)
            # The lowest bit is set so that no key is 0; 63 bits remain.
            key = int.from_bytes(digest.digest(), "little") | 1
        self._keys[word] = key
        return key


@lru_cache(maxsize=32)
def analyzer(language: str) -> Analyzer:
    """The analyzer of a language: one for the whole process, for the sake of its cache."""
    return Analyzer(language)


class QueryTerms(NamedTuple):
    """The distinct terms of a query: first its `words` (so many), then the dates that it names."""

    keys: npt.NDArray[np.uint64]
    words: int


@lru_cache(maxsize=1_024)
def query_terms(text: str, language: str) -> QueryTerms:
    """Cached: a search asks for them twice when it concerns several shards."""
    known = analyzer(language)
    own = dict.fromkeys(known.keys(text))
    dates = dict.fromkeys(known.key(term) for term in date_terms.query_terms(text))
    keys = [*own, *(key for key in dates if key not in own)]
    return QueryTerms(np.array(keys, dtype=np.uint64), len(own))
