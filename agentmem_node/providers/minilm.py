"""all-MiniLM-L6-v2, fp32, on onnxruntime through fastembed: the default embedding provider."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from agentmem_cluster.errors import ModelUnavailable
from agentmem_node.providers.base import ModelIdentity, Vectors
from agentmem_node.providers.batching import Batcher, BatchingLimits
from agentmem_node.providers.model_files import (
    MODEL_NAME,
    TOKENS_MAX,
    WEIGHTS_SHA256,
    ensure_model,
)

DIM = 384
IDENTITY = ModelIdentity(
    name=MODEL_NAME,
    dim=DIM,
    model_hash=hashlib.sha256(f"{WEIGHTS_SHA256}:{TOKENS_MAX}:mean:l2".encode()).hexdigest(),
)

# What the pinned weights compute, first components: a model from another source (or a broken
# runtime) that does not compute the same must not put vectors into the cluster.
PROBES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("The cat sat on the mat.", (0.1302, -0.0158, -0.0367, 0.0580, -0.0598, 0.0331)),
    ("Where did we go for dinner last June?", (0.0837, 0.0236, 0.0022, 0.0809, -0.0346, -0.0569)),
    ("日本の京都へ旅行した 🗾", (0.0435, 0.1170, 0.0495, -0.0162, -0.0411, 0.0671)),
)
PROBE_TOLERANCE = 2e-3


class MiniLmEngine:
    """The model in memory, about 150 MB. Not for concurrent use: `Batcher` owns the thread."""

    dim = DIM

    def __init__(self, directory: Path, threads: int) -> None:
        # Tokenising is 1 % of the work; a pool of threads for it only disturbs the others.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # onnxruntime's wheel holds a telemetry client that starts when it is imported. A memory
        # store reports to nobody.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        from fastembed import TextEmbedding  # 0.5 s: only where a model is wanted

        self._model: Any = TextEmbedding(
            MODEL_NAME,
            specific_model_path=str(directory),
            cache_dir=str(directory.parent),  # or it makes one in the system's temporary folder
            threads=threads,
        )
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(TOKENS_MAX)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows = list(self._model.embed(list(texts), batch_size=max(1, len(texts))))
        return np.asarray(rows, dtype=np.float32).reshape(len(texts), DIM)

    def check(self) -> None:
        """Raises ModelUnavailable when the model does not compute what the pinned one does."""
        found = self.embed([text for text, _ in PROBES])
        for vector, (text, expected) in zip(found, PROBES, strict=True):
            error = float(np.abs(vector[: len(expected)] - np.array(expected, np.float32)).max())
            if not error <= PROBE_TOLERANCE:  # also when it is not a number
                raise ModelUnavailable(
                    f"The embedding model on this machine is not {MODEL_NAME}: "
                    f"the vector of {text!r} is off by {error:.2g}.",
                    hint="Remove the cache directory and run "
                    "`python -m agentmem_node.providers.fetch`.",
                )


class MiniLmProvider:
    """An EmbeddingProvider. `await MiniLmProvider.open()`."""

    def __init__(self, engine: MiniLmEngine, limits: BatchingLimits | None = None) -> None:
        self._batcher = Batcher(engine, limits)

    @classmethod
    async def open(
        cls,
        *,
        threads: int = 1,
        cache: Path | None = None,
        download: bool = True,
        limits: BatchingLimits | None = None,
    ) -> MiniLmProvider:
        """Loads the model off the event loop, fetching it first when it is missing.

        `threads`: onnxruntime's, for one text batch at a time. Raises ModelUnavailable.
        """

        def load() -> MiniLmEngine:
            engine = MiniLmEngine(ensure_model(cache=cache, download=download), threads)
            engine.check()
            return engine

        return cls(await asyncio.to_thread(load), limits)

    @property
    def name(self) -> str:
        return IDENTITY.name

    @property
    def dim(self) -> int:
        return IDENTITY.dim

    @property
    def model_hash(self) -> str:
        return IDENTITY.model_hash

    @property
    def identity(self) -> ModelIdentity:
        return IDENTITY

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.zeros((0, DIM), np.float32)
        return await self._batcher.embed(texts, urgent=False)

    async def embed_query(self, text: str) -> Vectors:
        vector: Vectors = (await self._batcher.embed([text], urgent=True))[0]
        return vector

    def stats(self) -> dict[str, int]:
        return self._batcher.stats()

    async def close(self) -> None:
        await self._batcher.close()
