"""What the node asks of whatever turns text into vectors.

A provider is chosen once per cluster: vectors of two models share no space, so a node that
brings another `identity` than the cluster's is refused. Lexical-only operation is the absence
of a provider (`None`), chosen explicitly and never a fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a cluster's settings record: equal identities give comparable vectors."""

    name: str
    dim: int
    model_hash: str  # hex; two sources of the same weights give the same hash

    def __str__(self) -> str:
        details = [f"{self.dim} dimensions", self.model_hash[:12]]
        return f"{self.name} ({', '.join(filter(None, details))})"


class EmbeddingProvider(Protocol):
    """Text to unit vectors. Raises Overloaded, ModelUnavailable or ShuttingDown."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def model_hash(self) -> str: ...

    @property
    def identity(self) -> ModelIdentity: ...

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Shape (len(texts), dim), rows L2-normalised, in the order given."""
        ...

    async def embed_query(self, text: str) -> Vectors:
        """Shape (dim,), L2-normalised; served before documents that wait."""
        ...

    def stats(self) -> dict[str, int]:
        """Counters and gauges for metrics; `busy_us` is the time spent inside the model."""
        ...

    async def close(self) -> None:
        """Answer what waits with ShuttingDown and free the model. Safe to call twice."""
        ...
