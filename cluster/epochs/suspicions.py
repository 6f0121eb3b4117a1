"""Since when replicas have looked wrong, over looks that do not always see everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Subject(NamedTuple):
    """What is looked at: the replica of a member in an epoch, or the epoch as a whole ("")."""

    shard: str
    epoch: int
    member: str


class Suspicions:
    """What looks wrong must do so for a while: a node that starts looks so too.

    A look that does not reach a member says nothing of it. It neither clears the member nor begins
    the wait anew: else a replica behind a connection that comes and goes would never be mended.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: dict[Subject, tuple[str, float]] = {}

    def saw(self, subject: Subject, wrong: str, now_s: float) -> None:
        """`wrong`: what is wrong with it, "" when nothing is."""
        if not wrong:
            self._since.pop(subject, None)
        elif self._since.get(subject, ("", 0.0))[0] != wrong:
            self._since[subject] = (wrong, now_s)

    def is_certain(self, subject: Subject, now_s: float) -> bool:
        """Whether it has looked wrong, in the same way, for long enough."""
        known = self._since.get(subject)
        return known is not None and now_s - known[1] >= self._patience_s

    def keep(self, concerns: Callable[[Subject], bool]) -> None:
        """Forget all others: their epoch is over or is being ended."""
        self._since = {one: since for one, since in self._since.items() if concerns(one)}

    def clear(self) -> None:
        self._since.clear()
