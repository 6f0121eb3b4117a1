"""The proxy as its own process, driven by the real client of Toxiproxy."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator

import pytest
from toxiproxy import Toxiproxy

START_S_MAX = 20.0


@pytest.fixture(scope="session")
def proxy_address() -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "agentmem_chaos.proxy", "--port", "0", "--until-stdin-closes"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], START_S_MAX)
        assert readable, "the proxy did not start"
        word, _, address = process.stdout.readline().strip().partition(" ")
        assert word == "ready"
        host, _, port = address.rpartition(":")
        yield host, int(port)
        process.stdin.close()
        assert process.wait(10) == 0, "the proxy ends when its parent lets go of it"
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture
def toxiproxy(proxy_address: tuple[str, int]) -> Iterator[Toxiproxy]:
    server = Toxiproxy()
    server.update_api_consumer(*proxy_address)
    server.destroy_all()
    yield server
    server.destroy_all()
