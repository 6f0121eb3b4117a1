"""Start and stop the servers under test: child processes, ended by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


@dataclass(slots=True)
class Server:
    """One or several processes behind `ports`."""

    name: str
    processes: list[subprocess.Popen[bytes]]
    ports: list[int]
    directory: Path
    extra: dict[str, Any] = field(default_factory=dict)

    def url(self, number: int = 0) -> str:
        return f"http://127.0.0.1:{self.ports[number]}"


def free_ports(count: int, *, spaced: int = 0) -> list[int]:
    """Consecutive free ports, with their partners `spaced` higher free too (peer links)."""
    base = 20_000 + (os.getpid() * 37) % 20_000
    for start in range(base, 60_000, count + 1):
        wanted = [start + i for i in range(count)]
        if all(_is_free(p) for p in wanted + [p + spaced for p in wanted if spaced]):
            return wanted
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def request(method: str, url: str, document: object = None, timeout: float = 30.0) -> Any:
    """One JSON request; HTTP errors raise with the server's message in them."""
    data = None if document is None else json.dumps(document).encode()
    call = urllib.request.Request(
        url, data=data, method=method, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(call, timeout=timeout) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.code} {error.read()[:500]!r}") from error
    return json.loads(text) if text else None


def wait_ready(url: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode} before it was ready")
        try:
            request("GET", url, timeout=2.0)
            return
        except (OSError, RuntimeError):
            time.sleep(0.02)
    raise RuntimeError(f"{url} was not ready after {seconds} s")


def stop(process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **settings}


def start_node(directory: Path, port: int, **settings: str) -> subprocess.Popen[bytes]:
    log = (directory / "node.log").open("ab")
    return subprocess.Popen(
        [BIN / "agentmem", "serve", "--data", directory / "data", "--listen", f"127.0.0.1:{port}"],
        stdout=log,
        stderr=log,
        env=_environment(**settings),
    )


@contextlib.contextmanager
def agentmem_node(provider: str = "none", keep: Path | None = None) -> Iterator[Server]:
    """A single node. `provider` "none": vectors come with the requests, as from any client."""
    directory = keep or Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    (port,) = free_ports(1)
    process = start_node(directory, port, AGENTMEM_EMBEDDING_PROVIDER=provider)
    try:
        wait_ready(f"http://127.0.0.1:{port}/health/ready", process)
        yield Server("agentmem", [process], [port], directory)
    finally:
        stop(process)
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def agentmem_cluster(nodes: int = 3, provider: str = "none") -> Iterator[Server]:
    """A replicated cluster on loopback: `agentmem cluster dev`."""
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    ports = free_ports(nodes, spaced=100)
    log = (directory / "cluster.log").open("ab")
    process = subprocess.Popen(
        [
            BIN / "agentmem",
            "cluster",
            "dev",
            "--nodes",
            str(nodes),
            "--data",
            directory / "data",
            "--port",
            str(ports[0]),
        ],
        stdout=log,
        stderr=log,
        env=_environment(AGENTMEM_EMBEDDING_PROVIDER=provider),
    )
    try:
        for port in ports:
            wait_ready(f"http://127.0.0.1:{port}/health/ready", process)
        yield Server("agentmem x3", [process], ports, directory)
    finally:
        stop(process, 30.0)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def chroma() -> Iterator[Server]:
    """A chroma server with its default settings; AGENTMEM_BENCH_CHROMA names its program."""
    program = os.environ.get("AGENTMEM_BENCH_CHROMA") or shutil.which("chroma", path=str(BIN))
    if program is None:
        raise RuntimeError("chroma is not installed: pip install '.[bench]'")
    directory = Path(tempfile.mkdtemp(prefix="chroma-bench-"))
    (port,) = free_ports(1)
    log = (directory / "chroma.log").open("ab")
    process = subprocess.Popen(
        [program, "run", "--path", directory / "data", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
        env=_environment(ANONYMIZED_TELEMETRY="False"),
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}/api/v2/heartbeat", process)
        yield Server("chroma", [process], [port], directory)
    finally:
        stop(process)
        shutil.rmtree(directory, ignore_errors=True)


def resident_bytes(pid: int) -> tuple[int, int]:
    """(all resident, anonymous only) of a process; the first counts cached file pages."""
    total = anonymous = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            total = int(line.split()[1]) * 1024
        elif line.startswith("RssAnon:"):
            anonymous = int(line.split()[1]) * 1024
    return total, anonymous
