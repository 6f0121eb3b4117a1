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
from typing import Final

from py_rust_stemmers import SnowballStemmer

_WORD: Final = re.compile(r"\w+")
# Words seen recently, so that most need no stemming; a dictionary of this size stays below 10 MB.
_CACHE_WORDS_MAX: Final = 65_536

# Lucene's and the question words and pronouns of conversations, which say who speaks, not what of.
STOP_WORDS_EN: Final = frozenset(
    """a an and are as at be but by for if in into is it no not of on or such that the their then
    there these they this to was will with i me my we our you your he him his she her its them
    what which who whom when where why how do does did has have had been being am were would could
    should can may might about from s t d ll re ve m so than too very just also""".split()
)

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
    """
    return _WORD.findall(text.lower())


class Analyzer:
    """One language's words, stop words and stems. Unknown languages have neither of the latter."""

    def __init__(self, language: str) -> None:
        name = _SNOWBALL.get(language)
        self._stem = SnowballStemmer(name).stem_word if name else None
        self._stop_words = STOP_WORDS_EN if language == "en" else frozenset[str]()
        self._keys: dict[str, int] = {}

    def keys(self, text: str) -> list[int]:
        """The keys of a text's terms, in order, repetitions included; none of its stop words."""
        known = self._keys
        keys = []
        for word in _WORD.findall(text.lower()):
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

    def _learn(self, word: str) -> int:
        if len(self._keys) >= _CACHE_WORDS_MAX:
            self._keys.clear()
        if word in self._stop_words:
            key = 0
        else:
            stem = self._stem(word) if self._stem else word
            digest = hashlib.blake2b(stem.encode("utf-8", "surrogatepass"), digest_size=8)
            # The lowest bit is set so that no key is 0; 63 bits remain.
            key = int.from_bytes(digest.digest(), "little") | 1
        self._keys[word] = key
        return key


@lru_cache(maxsize=32)
def analyzer(language: str) -> Analyzer:
    """The analyzer of a language: one for the whole process, for the sake of its cache."""
    return Analyzer(language)


def query_keys(text: str | None, language: str) -> list[int]:
    """The distinct terms of a query, in the order of their first appearance."""
    return list(dict.fromkeys(analyzer(language).keys(text))) if text else []
