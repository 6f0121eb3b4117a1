"""The requests of one call that are on the wire: which, to whom, since when, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Attempt:
    number: int
    url: str
    sent_at: float
    hedge_at: float  # when another node may be asked beside it
    is_for_map: bool = False


@dataclass(slots=True)
class Attempts:
    """`tried`: nodes that were asked since the call last backed off.

    `numbers` gives each attempt of a call its number, whatever it is for.
    """

    numbers: Iterator[int]
    under_way: dict[int, Attempt] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    count: int = 0

    def begin(self, url: str, now: float, hedge_after_s: float, *, is_for_map: bool) -> Attempt:
        self.count += 1
        self.tried.add(url)
        attempt = Attempt(next(self.numbers), url, now, now + hedge_after_s, is_for_map=is_for_map)
        self.under_way[attempt.number] = attempt
        return attempt

    def end(self, number: int) -> Attempt | None:
        """The attempt, which is then no longer under way; None: nobody waits for it any more."""
        return self.under_way.pop(number, None)

    def drop_all(self) -> list[Attempt]:
        """Those that were under way: whatever comes of them is not waited for."""
        dropped = list(self.under_way.values())
        self.under_way.clear()
        return dropped

    def is_asked(self, url: str) -> bool:
        return any(attempt.url == url for attempt in self.under_way.values())

    def newest(self) -> Attempt:
        return max(self.under_way.values(), key=lambda attempt: attempt.number)
