"""Since when replicas have looked wrong, over looks that do not always see everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

# How many times as long as it takes to be certain may pass between two looks.
_GLIMPSES: Final = 4


class Subject(NamedTuple):
    """What is looked at: the replica of a member in an epoch, or the epoch as a whole ("")."""

    shard: str
    epoch: int
    member: str


class _Found(NamedTuple):
    wrong: str
    since_s: float
    seen_s: float


class Suspicions:
    """What looks wrong must do so for a while: a node that starts looks so too.

    A look that does not reach a member says nothing of it. It neither clears the member nor begins
    the wait anew: else a replica behind a connection that comes and goes would never be mended.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._found: dict[Subject, _Found] = {}

    def saw(self, subject: Subject, wrong: str, now_s: float) -> None:
        """`wrong`: what is wrong with it, "" when nothing is."""
        if not wrong:
            self._found.pop(subject, None)
            return
        known = self._found.get(subject)
        # Two glimpses far from each other say nothing of the time between.
        is_lost = known is None or now_s - known.seen_s > _GLIMPSES * self._patience_s
        since_s = now_s if known is None or is_lost or known.wrong != wrong else known.since_s
        self._found[subject] = _Found(wrong, since_s, now_s)

    def is_certain(self, subject: Subject, now_s: float) -> bool:
        """Whether it has looked wrong, in the same way, for long enough."""
        known = self._found.get(subject)
        return known is not None and now_s - known.since_s >= self._patience_s

    def keep(self, concerns: Callable[[Subject], bool]) -> None:
        """Forget all others: their epoch is over or is being ended."""
        self._found = {one: found for one, found in self._found.items() if concerns(one)}

    def clear(self) -> None:
        self._found.clear()
