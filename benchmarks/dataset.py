"""The 100,000 memories of the benchmarks: owners of 100, 1,000 and 10,000, made from a seed.

Vectors are unit vectors around a few hundred topics, as embeddings are; texts are words drawn
by Zipf's law, more alike within a topic. Nothing about either is tuned to an index.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OWNER_SIZES = {100: 200, 1_000: 40, 10_000: 4}  # size -> how many owners: 100,000 in all
_TOPICS = 300
_WORDS = 8_000
_SYLLABLES = [consonant + vowel for consonant in "bdklmr" for vowel in "aeiou"]


@dataclass(slots=True)
class Dataset:
    vectors: npt.NDArray[np.float32]  # (n, dim), unit length
    texts: list[str]
    owners: list[str]  # of each memory
    rows_of: dict[str, npt.NDArray[np.int64]]

    def owners_of_size(self, size: int) -> list[str]:
        return [o for o, rows in self.rows_of.items() if len(rows) == size]


def _word(number: int) -> str:
    parts = []
    number += 30
    while number:
        number, digit = divmod(number, len(_SYLLABLES))
        parts.append(_SYLLABLES[digit])
    return "".join(parts)


def make(scale: float = 1.0, dim: int = 384, seed: int = 7) -> Dataset:
    """`scale` below 1 makes fewer owners of each size, for a quick look."""
    rng = np.random.default_rng(seed)
    owners: list[str] = []
    for size, count in OWNER_SIZES.items():
        for number in range(max(1, int(count * scale))):
            owners += [f"u{size}-{number}"] * size
    n = len(owners)
    topics = rng.standard_normal((_TOPICS, dim)).astype(np.float32)
    topic = rng.integers(0, _TOPICS, n)
    vectors = topics[topic] + rng.standard_normal((n, dim)).astype(np.float32) * 0.9
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = [_word(i) for i in range(_WORDS)]
    ranks = np.minimum(rng.zipf(1.3, (n, 12)) - 1, _WORDS - 1)
    ranks[:, :4] = (topic[:, None] * 17 + ranks[:, :4]) % _WORDS
    texts = [" ".join(words[r] for r in row) for row in ranks]
    order = rng.permutation(n)  # owners' memories arrive interleaved, as in life
    rows_of: dict[str, list[int]] = {}
    shuffled = [owners[i] for i in order]
    for row, owner in enumerate(shuffled):
        rows_of.setdefault(owner, []).append(row)
    return Dataset(
        vectors[order],
        [texts[i] for i in order],
        shuffled,
        {owner: np.array(rows, dtype=np.int64) for owner, rows in rows_of.items()},
    )


def queries(data: Dataset, size: int, count: int, seed: int = 11) -> list[tuple[str, int]]:
    """(owner, row to disturb) pairs over owners of `size`."""
    rng = np.random.default_rng(seed)
    owners = data.owners_of_size(size)
    picks = []
    for _ in range(count):
        owner = owners[int(rng.integers(len(owners)))]
        picks.append((owner, int(rng.choice(data.rows_of[owner]))))
    return picks


def query_vector(data: Dataset, row: int, seed: int) -> npt.NDArray[np.float32]:
    """A vector near a stored one: what a question about a memory embeds to."""
    noise = np.random.default_rng(seed).standard_normal(data.vectors.shape[1]).astype(np.float32)
    vector = data.vectors[row] + noise * np.float32(0.6 / np.sqrt(data.vectors.shape[1]))
    unit: npt.NDArray[np.float32] = vector / np.linalg.norm(vector)
    return unit


def exact_top(data: Dataset, owner: str, vector: npt.NDArray[np.float32], k: int) -> list[int]:
    """Rows of the k nearest memories of an owner, by brute force in float32."""
    rows = data.rows_of[owner]
    scores = data.vectors[rows] @ vector
    return [int(rows[i]) for i in np.argsort(-scores, kind="stable")[:k]]


def floats(vector: npt.NDArray[np.float32]) -> list[float]:
    """A JSON-ready list with as many digits as float32 holds."""
    return [round(float(x), 7) for x in vector]


def body(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
