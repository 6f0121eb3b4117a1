"""Plants over several processes: each is patched in where it is played, and nowhere else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence

from agentmem_chaos.sim.planted import PLANTS, Found, find


def find_all(chosen: Sequence[int], *, jobs: int) -> Iterator[tuple[int, Found]]:
    """(place in `PLANTS`, what became of it), in that order."""
    if jobs == 1 or len(chosen) == 1:
        yield from map(_find, chosen)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) as pool:
        yield from pool.imap(_find, chosen)


def _find(at: int) -> tuple[int, Found]:
    return at, find(PLANTS[at])
