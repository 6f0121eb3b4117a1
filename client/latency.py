"""How long calls of one kind took lately, and so how long to wait before asking another node."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field

_WINDOW = 200
# A quantile of fewer says nothing about the tail.
_SAMPLES_MIN = 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a hedge delay, in seconds. `first`: while too little was measured."""

    first_s: float
    min_s: float
    max_s: float


@dataclass(slots=True)
class Latencies:
    """The last 200 calls of one kind, in seconds: in the order they came, and sorted."""

    _recent: deque[float] = field(default_factory=deque)
    _sorted: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        if len(self._recent) == _WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(seconds)
        bisect.insort(self._sorted, seconds)

    def quantile(self, q: float) -> float | None:
        """Seconds within which a share `q` of the calls was answered; None: too few are known."""
        count = len(self._sorted)
        if count < _SAMPLES_MIN:
            return None
        return self._sorted[min(count - 1, int(q * count))]

    def hedge_after(self, q: float, bounds: Bounds) -> float:
        """Seconds."""
        usual = self.quantile(q)
        if usual is None:
            return bounds.first_s
        return min(bounds.max_s, max(bounds.min_s, usual))
