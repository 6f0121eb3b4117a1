"""etcd as the other side of `benchmarks.raft`: three members, and a gRPC client that costs little.

The client speaks the few HTTP/2 frames that a unary call takes, because a generic client in
Python would be the bottleneck and make etcd look slow. Its JSON gateway would, too: there every
put is decoded, encoded and sent once more inside etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop

from benchmarks.servers import free_ports, request, stop

CONNECTIONS = 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WINDOW_BYTES = 65_535


@dataclass(frozen=True, slots=True)
class Cluster:
    leader_port: int
    pids: list[int]


def available() -> bool:
    return shutil.which("etcd") is not None


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Three etcd members with default settings, data on the disk that the other side uses."""
    directory = Path(tempfile.mkdtemp(prefix="etcd-bench-"))
    ports = free_ports(6)
    clients, peers = ports[:3], ports[3:]
    members = ",".join(f"e{i}=http://127.0.0.1:{peers[i]}" for i in range(3))
    processes = [
        subprocess.Popen(
            [
                "etcd",
                f"--name=e{i}",
                f"--data-dir={directory / f'e{i}'}",
                f"--listen-client-urls=http://127.0.0.1:{clients[i]}",
                f"--advertise-client-urls=http://127.0.0.1:{clients[i]}",
                f"--listen-peer-urls=http://127.0.0.1:{peers[i]}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peers[i]}",
                f"--initial-cluster={members}",
                "--initial-cluster-state=new",
                "--log-level=error",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(directory / f"e{i}.log").open("wb"),
            env={**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine},
        )
        for i in range(3)
    ]
    try:
        yield Cluster(_leader(clients), [process.pid for process in processes])
    finally:
        for process in processes:
            stop(process)
        shutil.rmtree(directory, ignore_errors=True)


def _leader(ports: list[int], seconds: float = 20.0) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, RuntimeError, KeyError):
            for port in ports:
                status = request("POST", f"http://127.0.0.1:{port}/v3/maintenance/status", {})
                if status["leader"] == status["header"]["member_id"]:
                    return port
        time.sleep(0.05)
    raise RuntimeError("etcd has no leader")


def load(server: Cluster, size_bytes: int, inflight: int, seconds: float) -> dict[str, Any]:
    """Keep `inflight` puts of `size_bytes` on their way to the leader."""
    before = _cpu_s(server)
    latencies, took_s = uvloop.run(_load(server.leader_port, size_bytes, inflight, seconds))
    used_s = _cpu_s(server) - before
    latencies.sort()
    return {
        "rate": len(latencies) / took_s,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "cpu_us": used_s / len(latencies) * 1e6,
    }


def _cpu_s(server: Cluster) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in server.pids]
    return float(sum(t.user + t.system for t in times))


async def _load(
    port: int, size_bytes: int, inflight: int, seconds: float
) -> tuple[list[float], float]:
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(_Puts, "127.0.0.1", port))[1]
        for _ in range(min(CONNECTIONS, inflight))
    ]
    value = os.urandom(size_bytes)
    latencies: list[float] = []
    begun_s = time.perf_counter()
    end_s = begun_s + seconds

    async def worker(number: int) -> None:
        connection = connections[number % len(connections)]
        body = _put_request(b"key-%d" % number, value)
        while (sent_s := time.perf_counter()) < end_s:
            await connection.call(body)
            latencies.append(time.perf_counter() - sent_s)

    await asyncio.gather(*(worker(number) for number in range(inflight)))
    took_s = time.perf_counter() - begun_s
    for connection in connections:
        connection.close()
    return latencies, took_s


def _put_request(key: bytes, value: bytes) -> bytes:
    message = b"\x0a" + _varint(len(key)) + key + b"\x12" + _varint(len(value)) + value
    return b"\x00" + len(message).to_bytes(4, "big") + message


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def _literal(prefix: bytes, value: bytes) -> bytes:
    return prefix + bytes((len(value),)) + value


# HPACK (RFC 7541) with static names and literal values only: the same bytes for every call.
_REQUEST_HEADERS = (
    b"\x83\x86"  # :method POST, :scheme http
    + _literal(b"\x04", b"/etcdserverpb.KV/Put")
    + _literal(b"\x01", b"localhost")
    + _literal(b"\x0f\x10", b"application/grpc")
    + _literal(_literal(b"\x00", b"te"), b"trailers")
)


class _Puts(asyncio.Protocol):
    """Unary calls over one HTTP/2 connection. A call succeeded when it brought a message."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._next_stream = 1
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._answered: set[int] = set()
        self._window = _WINDOW_BYTES
        self._queue: deque[bytes] = deque()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        grow = (0x7FFFFFFF - _WINDOW_BYTES).to_bytes(4, "big")
        self._transport.write(
            _PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_WINDOW_UPDATE, 0, 0, grow)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("etcd closed the connection"))

    def close(self) -> None:
        self._transport.close()

    async def call(self, body: bytes) -> None:
        stream = self._next_stream
        self._next_stream += 2
        future = self._waiting[stream] = asyncio.get_running_loop().create_future()
        self._transport.write(_frame(_HEADERS, _END_HEADERS, stream, _REQUEST_HEADERS))
        self._queue.append(_frame(_DATA, _END_STREAM, stream, body))
        self._send_data()
        await future

    def _send_data(self) -> None:
        while self._queue and len(self._queue[0]) - 9 <= self._window:
            frame = self._queue.popleft()
            self._window -= len(frame) - 9
            self._transport.write(frame)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at < 9 + size:
                break
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            self._received(kind, flags, stream, bytes(buffer[at + 9 : at + 9 + size]))
            at += 9 + size
        del buffer[:at]

    def _received(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._answered.add(stream)
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            self._send_data()
        elif kind == _GO_AWAY:
            self._transport.abort()
        if kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            future = self._waiting.pop(stream)
            if future.done():
                return
            if stream in self._answered and kind != _RESET:
                self._answered.discard(stream)
                future.set_result(None)
            else:
                future.set_exception(RuntimeError("etcd refused a put"))
