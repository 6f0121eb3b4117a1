"""An HTTP load generator that is cheap enough to share a machine with what it measures.

Requests are bytes that were built before the clock started; connections are raw asyncio
protocols that only look for the end of an answer. Two modes:

- `closed`: `in_flight` requests are always under way. Gives the highest rate a server sustains.
- `open`: requests arrive at a given rate whether or not earlier ones were answered, and latency
  counts from the moment a request *should* have been sent, so a stall is charged to everyone
  who would have met it (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def http_request(
    method: str, path: str, body: bytes = b"", host: str = "localhost", headers: str = ""
) -> bytes:
    """A complete HTTP/1.1 request."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


@dataclass(slots=True)
class Result:
    """What a run measured. Latencies in milliseconds."""

    seconds: float
    answered: int
    errors: int
    latencies_ms: list[float] = field(repr=False)
    offered_rate: float | None = None
    first_error: str = ""

    @property
    def rate(self) -> float:
        return self.answered / self.seconds

    def percentile(self, share: float) -> float:
        if not self.latencies_ms:
            return float("nan")
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]

    def summary(self) -> dict[str, float | int | str | None]:
        return {
            "rate": round(self.rate, 1),
            "p50_ms": round(self.percentile(0.5), 3),
            "p99_ms": round(self.percentile(0.99), 3),
            "answered": self.answered,
            "errors": self.errors,
            "offered_rate": self.offered_rate,
            "first_error": self.first_error,
        }


class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time. `on_answer(status, body)` follows each."""

    def __init__(self) -> None:
        self._buffer = b""
        self.on_answer: Callable[[int, bytes], None] = lambda status, body: None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_answer(0, b"connection lost")

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
            return
        head = buffer[:end].lower()
        start = head.find(b"content-length:")
        if start >= 0:
            stop = head.find(b"\r\n", start)
            length = int(head[start + 15 : stop if stop >= 0 else None])
            if len(buffer) < end + 4 + length:
                self._buffer = buffer
                return
            body = buffer[end + 4 : end + 4 + length]
        elif b"transfer-encoding: chunked" in head:
            if not buffer.endswith(b"0\r\n\r\n"):
                self._buffer = buffer
                return
            body = buffer[end + 4 :]
        else:
            body = b""
        self._buffer = b""
        self.on_answer(int(buffer[9:12]), body)


async def run(
    host: str,
    port: int,
    requests: Sequence[bytes],
    *,
    seconds: float,
    in_flight: int,
    rate: float | None = None,
    warm_up_s: float = 1.0,
    count: int | None = None,
) -> Result:
    """Send `requests` round and round for `seconds` after a warm-up (or `count` of them, once).

    Closed loop over `in_flight` connections, or open loop at `rate` a second when given.
    """
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(in_flight):
        _, connection = await loop.create_connection(_Connection, host, port)
        connections.append(connection)
    latencies: list[float] = []
    errors = 0
    first_error = ""
    position = 0
    begun = time.perf_counter()
    measure_from = begun + (0.0 if count is not None else warm_up_s)
    end = measure_from + seconds
    done = loop.create_future()
    busy = 0
    idle: list[_Connection] = []
    waiting: list[float] = []

    def settle(started: float, status: int, body: bytes) -> None:
        nonlocal errors, first_error
        now = time.perf_counter()
        if started >= measure_from and (count is not None or now <= end):
            if 200 <= status < 300:
                latencies.append((now - started) * 1000)
            else:
                errors += 1
                first_error = first_error or f"{status} {body[:300]!r}"

    def send(connection: _Connection, due: float | None = None) -> None:
        nonlocal position, busy
        now = time.perf_counter()
        over = position >= count if count is not None else now >= end
        if over:
            if busy == 0 and not done.done():
                done.set_result(None)
            return
        started = now if due is None else due
        data = requests[position % len(requests)]
        position += 1
        busy += 1

        def answered(status: int, body: bytes) -> None:
            nonlocal busy
            busy -= 1
            settle(started, status, body)
            if status == 0:
                if not done.done():
                    done.set_result(None)
            elif rate is None:
                send(connection)
            elif waiting:
                send(connection, waiting.pop(0))
            else:
                idle.append(connection)
                if time.perf_counter() >= end and busy == 0 and not done.done():
                    done.set_result(None)

        connection.on_answer = answered
        assert connection.transport is not None
        connection.transport.write(data)

    if rate is None:
        for connection in connections:
            send(connection)
    else:
        idle.extend(connections)
        arrivals = asyncio.ensure_future(_arrivals(rate, begun, end, idle, waiting, send))
        done.add_done_callback(lambda _: arrivals.cancel())
    limit = (seconds + warm_up_s) * 3 + 60
    await asyncio.wait_for(done, limit)
    took = (
        time.perf_counter() if count is not None else min(time.perf_counter(), end)
    ) - measure_from
    for connection in connections:
        connection.on_answer = lambda status, body: None
        if connection.transport is not None:
            connection.transport.close()
    return Result(took, len(latencies), errors, latencies, rate, first_error)


async def _arrivals(
    rate: float,
    begun: float,
    end: float,
    idle: list[_Connection],
    waiting: list[float],
    send: Callable[[_Connection, float | None], None],
) -> None:
    """Offer requests on a fixed schedule; those that find no free connection wait their turn."""
    number = 0
    while True:
        now = time.perf_counter()
        if now >= end:
            return
        while (due := begun + number / rate) <= now:
            number += 1
            if idle:
                send(idle.pop(), due)
            else:
                waiting.append(due)
        await asyncio.sleep(max(0.0, min(0.002, due - now)))


def median_run(results: Sequence[Result]) -> Result:
    """The run whose rate is the median: figures of one real run, not a mixture."""
    ordered = sorted(results, key=lambda r: r.rate)
    return ordered[len(ordered) // 2]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
