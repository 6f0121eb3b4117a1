"""Virtual time: one heap of events, clocks that read it, and chance drawn from the seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

# 2026-01-01: record times in a simulated world are plausible and the same in every run.
WALL_START_MS = 1_767_225_600_000


class Schedule:
    """What happens next. Time stands still while an event runs and jumps to the next one."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self.stopped = False
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in `delay_s` virtual seconds; equal times keep the order of asking."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now_s + max(0.0, delay_s), self._sequence, action))

    def run_until(self, until_s: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(heap)
            self.events += 1
            action()
            if self.stopped:
                return
        self.now_s = until_s

    def stop(self) -> None:
        """End the run after the event at hand: what follows a violation explains nothing."""
        self.stopped = True


def stream(seed: int, name: str) -> random.Random:
    """A stream of chance of its own for each user of it.

    One shared stream would let a different order of unrelated draws change everything; with
    streams, a world is a function of the seed alone, whatever order a set iterates in.
    """
    return random.Random(f"{seed}/{name}")


class SimClock:
    """A node's clock: virtual time at a rate of its own, which a fault may change."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._since_s = 0.0
        self._reading_s = 0.0
        self._wall_offset_ms = 0
        self.rate = 1.0

    def monotonic(self) -> float:
        return self._reading_s + (self._schedule.now_s - self._since_s) * self.rate

    def wall_ms(self) -> int:
        return WALL_START_MS + self._wall_offset_ms + int(self._schedule.now_s * 1000)

    def set_rate(self, rate: float) -> None:
        self._reading_s = self.monotonic()
        self._since_s = self._schedule.now_s
        self.rate = rate

    def jump_wall(self, offset_ms: int) -> None:
        self._wall_offset_ms += offset_ms

    def virtual_s_until(self, reading_s: float) -> float:
        """Virtual seconds until this clock shows `reading_s`; 0 when it already has."""
        return max(0.0, (reading_s - self.monotonic()) / self.rate)


class SimRng:
    """A node's chance: reproducible, and so unfit for anything but the simulator."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def random(self) -> float:
        return self._source.random()

    def token(self, size_bytes: int) -> bytes:
        return self._source.randbytes(size_bytes)
