"""`python -m agentmem_node.providers.fetch`: put the embedding model into the cache."""

from __future__ import annotations

import sys

from agentmem_cluster.errors import ModelUnavailable
from agentmem_node.providers.model_files import ensure_model


def main() -> int:
    """0 when the model is ready, 1 when it cannot be had."""
    try:
        directory = ensure_model(lambda step, share: print(f"{share:4.0%}  {step}", flush=True))
    except ModelUnavailable as error:
        print(f"error: {error.message}\n{error.hint}", file=sys.stderr)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
