"""A development cluster that others join, and nodes that do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.devlayout import HOST, free_port

AGENTMEM = [sys.executable, "-m", "agentmem_node.cli.main"]
LEXICAL = {"embedding.provider": "none", "embedding.dim": 0, "cluster.shards": 4}


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def ask(url: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
    request = urllib.request.Request(
        url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@dataclass
class Newcomer:
    """`agentmem serve --join` as a process; `stop` ends it."""

    process: subprocess.Popen[str]
    url: str
    data: Path

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(self.end())
        try:
            return ask(self.url, "GET", "/health/ready")[0] == 200
        except OSError:
            return False

    def end(self, seconds: float = 60.0) -> tuple[int, str]:
        """(exit code, everything that it printed) of one that ends by itself."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out + err

    def stop(self) -> str:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.end(20.0)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.end(20.0)[1]


class Site:
    """Starts nodes that join, each in a directory of its own, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Newcomer] = []
        self._ports: dict[str, int] = {}

    def serve(self, name: str, *more: str) -> Newcomer:
        """`agentmem serve` in the directory `name`, again on the same ports."""
        port = self._ports.setdefault(name, free_port(1))
        data = self.folder / name
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")}
        process = subprocess.Popen(
            [*AGENTMEM, "serve", "--data", str(data), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kept,
            start_new_session=True,
        )
        newcomer = Newcomer(process, f"http://{HOST}:{port}", data)
        self._started.append(newcomer)
        return newcomer

    def join(self, name: str, token: str, at: str, *more: str, node_id: str = "") -> Newcomer:
        port = self._ports.setdefault(name, free_port(1))
        return self.serve(
            name,
            *("--join", token, "--at", at, "--id", node_id or name),
            *("--listen", f"{HOST}:{port}", "--peer-listen", f"{HOST}:{port + 100}"),
            *more,
        )

    def stop(self) -> None:
        for newcomer in self._started:
            if newcomer.process.poll() is None:
                newcomer.stop()


def join_token(url: str, *more: str) -> str:
    """As an operator makes one."""
    done = subprocess.run(
        [*AGENTMEM, "cluster", "join-token", "--url", url, *more],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["token"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    with DevCluster(tmp_path_factory.mktemp("three"), settings=LEXICAL) as three:
        yield three


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.stop()
