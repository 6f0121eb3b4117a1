"""Which provider a node's settings name. `none` is a choice, never a fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from agentmem_node.providers.base import EmbeddingProvider, ModelIdentity
from agentmem_node.providers.batching import BatchingLimits

ProviderName = Literal["minilm", "none"]


def identity_of(name: ProviderName, dim: int) -> ModelIdentity:
    """What a cluster with this provider records, known before the model is loaded.

    `dim` counts for `none` only: the dimension of the vectors that clients bring, 0 for none.
    """
    match name:
        case "none":
            return ModelIdentity("none", dim, "")
        case "minilm":
            from agentmem_node.providers.minilm import IDENTITY

            return IDENTITY


async def open_provider(
    name: ProviderName,
    *,
    threads: int = 1,
    cache: Path | None = None,
    download: bool = True,
    limits: BatchingLimits | None = None,
) -> EmbeddingProvider | None:
    """The provider ready to embed, or None for lexical-only. Raises ModelUnavailable."""
    match name:
        case "none":
            return None
        case "minilm":
            # Imported here: a lexical-only node must not need the model's packages.
            from agentmem_node.providers.minilm import MiniLmProvider

            return await MiniLmProvider.open(
                threads=threads, cache=cache, download=download, limits=limits
            )
