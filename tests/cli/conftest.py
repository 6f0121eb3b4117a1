"""The commands against the same small cluster as the client's tests."""

from __future__ import annotations

import asyncio
import io
import json
import runpy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentmem_node.api.server import HttpServer
from agentmem_node.cli import following
from agentmem_node.cli.app import run
from agentmem_node.config import load
from agentmem_node.observe.metrics import Metrics
from tests.api.conftest import DictionaryService

fake = runpy.run_path(str(Path(__file__).parent.parent / "client" / "conftest.py"))["fake"]


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def agentmem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Runs `agentmem ARGUMENTS` in this process; output counts as piped unless `terminal`.

    `typed`: what a person at a terminal types; None: nobody is there.
    """
    for name in ("AGENTMEM_URL", "AGENTMEM_API_KEY", "AGENTMEM_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, terminal: bool = False, typed: str | None = None) -> Ran:
        import sys

        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setenv("COLUMNS", "160")
            if typed is not None:
                keyboard = io.StringIO(typed)
                patched.setattr(keyboard, "isatty", lambda: True)
                patched.setattr(sys, "stdin", keyboard)
            if terminal:
                patched.setattr(sys.stdout, "isatty", lambda: True)
            code = run(list(arguments))
        out, err = capsys.readouterr()
        return Ran(int(code), out, err)

    return call


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[DictionaryService]:
    """A node's real HTTP API in a thread of its own, before operations in memory; AGENTMEM_URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    config = load(environment={}, overrides={"node.listen": "127.0.0.1:0"}).config
    service = DictionaryService(limits=config.limits)
    server = HttpServer(service, config, metrics=Metrics(service.metrics_snapshot))
    address = asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    service.url = f"http://{address}"
    monkeypatch.setenv("AGENTMEM_URL", service.url)
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    try:
        yield service
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(grace_s=2), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()
