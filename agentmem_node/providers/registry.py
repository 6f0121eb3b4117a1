"""Which provider a node's settings name. `none` is a choice, never a fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from agentmem_node.providers.base import EmbeddingProvider
from agentmem_node.providers.batching import BatchingLimits

ProviderName = Literal["minilm", "none"]


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
