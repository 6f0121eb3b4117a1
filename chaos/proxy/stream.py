"""One direction of one connection: bytes go in, come out later, in pieces, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence

from agentmem_chaos.proxy.changes import Changes
from agentmem_chaos.proxy.toxics import Toxic

CHUNK_BYTES = 64 * 1024
# What may be under way inside the proxy; beyond it the sender is made to wait, as by a network.
HELD_BYTES_MAX = 4 * 1024 * 1024

Active = Callable[[], Sequence[Toxic]]


class Cut(Exception):
    """A toxic ends the connection here."""


class Stream:
    """`active`: the toxics that befall this direction now, in the order they were added.

    Reading and writing are two tasks: a delayed byte must not delay the reading of the next, or
    latency would become a limit of bandwidth.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        active: Active,
        changes: Changes,
        chance: random.Random,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._active = active
        self._changes = changes
        self._chance = chance
        self._held: deque[tuple[float, bytes]] = deque()  # (when it arrived, bytes)
        self._held_bytes = 0
        self._ended = False
        self._turn = asyncio.Event()
        self._passed: dict[int, int] = {}  # of limit_data: bytes since it befell this connection
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Return when the source ended and everything was passed on. Raises Cut, OSError."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(CHUNK_BYTES):
                self._held.append((self._loop.time(), data))
                self._held_bytes += len(data)
                self._turn.set()
                while self._held_bytes > HELD_BYTES_MAX:
                    self._turn.clear()
                    await self._turn.wait()
        except OSError:
            pass  # the source is gone: as good as its end
        self._ended = True
        self._turn.set()

    async def _write(self) -> None:
        while True:
            while not self._held:
                if self._ended:
                    await self._close()
                    return
                self._turn.clear()
                await self._turn.wait()
            arrived_s, data = self._held.popleft()
            await self._pass(arrived_s, data)
            self._held_bytes -= len(data)
            self._turn.set()

    async def _pass(self, arrived_s: float, data: bytes) -> None:
        if self._has("timeout") or self._has("reset_peer"):
            return  # lost
        await self._delay(arrived_s)
        if self._has("timeout") or self._has("reset_peer"):
            return
        for piece, pause_s in self._pieces(data):
            allowed, cut = self._limited(piece)
            if allowed:
                await self._throttle(len(allowed))
                self._writer.write(allowed)
                await self._writer.drain()
            if cut:
                raise Cut
            if pause_s:
                await asyncio.sleep(pause_s)

    def _has(self, kind: str) -> bool:
        return any(toxic.type == kind for toxic in self._active())

    async def _delay(self, arrived_s: float) -> None:
        """Until the latencies that hold now are over; a toxic that goes wakes this up."""
        jitter = self._chance.uniform(-1.0, 1.0)
        while True:
            delay_ms = sum(
                max(0.0, toxic["latency"] + jitter * toxic["jitter"])
                for toxic in self._active()
                if toxic.type == "latency"
            )
            left_s = arrived_s + delay_ms / 1e3 - self._loop.time()
            if left_s <= 0:
                return
            await self._pause(left_s)

    async def _throttle(self, size: int) -> None:
        for toxic in self._active():
            if toxic.type == "bandwidth" and toxic["rate"] > 0:
                due_s = self._loop.time() + size / (toxic["rate"] * 1024)
                while (left_s := due_s - self._loop.time()) > 0 and toxic in self._active():
                    await self._pause(left_s)

    async def _pause(self, seconds: float) -> None:
        """That long, or until the proxy's toxics change."""
        await self._changes.after(self._changes.count, seconds)

    def _pieces(self, data: bytes) -> list[tuple[bytes, float]]:
        slicer = next((toxic for toxic in self._active() if toxic.type == "slicer"), None)
        if slicer is None or slicer["average_size"] < 1:
            return [(data, 0.0)]
        pieces: list[tuple[bytes, float]] = []
        while data:
            vary = slicer["size_variation"]
            size = max(1, slicer["average_size"] + self._chance.randint(-vary, vary))
            pieces.append((data[:size], slicer["delay"] / 1e6))
            data = data[size:]
        return pieces

    def _limited(self, data: bytes) -> tuple[bytes, bool]:
        """(what may pass, whether the connection ends after it)."""
        cut = False
        for toxic in self._active():
            if toxic.type == "limit_data":
                passed = self._passed.get(toxic.serial, 0)
                data = data[: max(0, toxic["bytes"] - passed)]
                self._passed[toxic.serial] = passed + len(data)
                cut = cut or self._passed[toxic.serial] >= toxic["bytes"]
        return data, cut

    async def _close(self) -> None:
        delay_ms = max((t["delay"] for t in self._active() if t.type == "slow_close"), default=0)
        if delay_ms:
            await self._pause(delay_ms / 1e3)
        if self._writer.can_write_eof():
            self._writer.write_eof()
