"""Toxiproxy, or our own proxy that speaks its API, driven by `toxiproxy-python`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from agentmem_chaos.errors import ChaosError

CALL_S_MAX = 10.0
START_S_MAX = 20.0

T = TypeVar("T")


class ProxyServer:
    """Our own proxy as a child process on a free port of loopback."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> tuple[str, int]:
        """(host, port) of its HTTP API."""
        command = (sys.executable, "-m", "agentmem_chaos.proxy", "--port", "0")
        self._process = await asyncio.create_subprocess_exec(
            *command,
            "--until-stdin-closes",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_S_MAX):
                line = (await self._process.stdout.readline()).decode()
        except TimeoutError:
            line = ""
        word, _, address = line.strip().partition(" ")
        if word != "ready":
            await self.stop()
            raise ChaosError(f"The proxy did not start: it said {line!r}.")
        host, _, port = address.rpartition(":")
        return host, int(port)

    async def stop(self) -> None:
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._process = None


class Proxies:
    """The proxies of a run by name. The client library blocks, so it is called in a thread."""

    def __init__(self, host: str, port: int) -> None:
        try:
            from toxiproxy import Toxiproxy
        except ImportError as error:
            raise ChaosError(
                "toxiproxy-python is not installed: pip install 'agentmem-cluster[chaos]'."
            ) from error
        self._server = Toxiproxy()
        self._server.update_api_consumer(host, port)
        self._by_name: dict[str, Any] = {}
        self._disabled: set[str] = set()
        self._poisoned: dict[str, set[str]] = {}
        self._lock = asyncio.Lock()

    async def _call(self, what: Callable[[], T]) -> T:
        async with self._lock:
            try:
                return await asyncio.wait_for(asyncio.to_thread(what), CALL_S_MAX)
            except TimeoutError:
                raise ChaosError(f"The proxy did not answer within {CALL_S_MAX:g} s.") from None
            except Exception as error:
                raise ChaosError(f"The proxy refused: {error}") from error

    async def create(self, name: str, upstream: str, listen: str = "127.0.0.1:0") -> str:
        """Make a proxy; returns the address it listens on."""
        made = await self._call(
            lambda: self._server.create(upstream=upstream, name=name, listen=listen)
        )
        self._by_name[name] = made
        listening: str = made.listen
        return listening

    async def adopt(self, names: Iterable[str]) -> None:
        """Take over proxies that somebody else made. Raises ChaosError when one is missing."""
        there = await self._call(self._server.proxies)
        for name in names:
            if name not in there:
                raise ChaosError(f"Toxiproxy has no proxy {name}; it has {', '.join(there)}.")
            self._by_name[name] = there[name]

    async def poison(
        self,
        name: str,
        kind: str,
        stream: str,
        attributes: Mapping[str, int],
        toxicity: float = 1.0,
    ) -> None:
        toxic = f"{kind}_{stream}"
        if toxic in self._poisoned.get(name, set()):
            return
        proxy = self._by_name[name]
        await self._call(
            lambda: proxy.add_toxic(
                name=toxic,
                type=kind,
                stream=stream,
                attributes=dict(attributes),
                toxicity=toxicity,
            )
        )
        self._poisoned.setdefault(name, set()).add(toxic)

    async def cure(self, name: str, kind: str, stream: str) -> None:
        toxic = f"{kind}_{stream}"
        if toxic in self._poisoned.get(name, set()):
            await self._call(lambda: self._by_name[name].destroy_toxic(toxic))
            self._poisoned[name].discard(toxic)

    async def cure_all(self) -> None:
        await self._call(self._server.reset)
        self._poisoned.clear()
