"""Nodes as processes of this machine; how they reach each other is for subclasses to say."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts import instruments, settings, shell
from agentmem_chaos.hosts.base import Need, Pair
from agentmem_chaos.hosts.process import NodeProcess
from agentmem_chaos.hosts.proxies import Proxies, ProxyServer
from agentmem_chaos.hosts.settings import Place

SMALL_DISK_BYTES = 160 << 20
# A node of a run with eight clients grows by less.
SMALL_DISK_BYTES_PER_S = 128 << 10


class LocalHosts(ABC):
    """`folder`: an empty folder for everything that the run leaves behind."""

    kind = "local"

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.nodes = tuple(f"n{number}" for number in range(1, count + 1))
        self.api_key = f"am_{secrets.token_hex(24)}"
        self._server = ProxyServer()
        self._proxies: Proxies | None = None
        self._client_urls: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        self._processes: dict[str, NodeProcess] = {}
        self._clocks: dict[str, instruments.LyingClock] = {}
        self._calls: dict[str, instruments.FailingCalls] = {}
        self._mounted: list[Path] = []
        self._pipe: tuple[int, int] | None = None
        self._equip: frozenset[Need] = frozenset()
        self._small_disk_bytes = SMALL_DISK_BYTES

    # -- what subclasses say ----------------------------------------------------------------

    @abstractmethod
    async def _prepare_network(self) -> None:
        """Make ready what nodes and proxies listen on."""

    @abstractmethod
    def _listen(self, node: str) -> str:
        """HOST:PORT of the node's HTTP API."""

    @abstractmethod
    def _peer_listen(self, node: str) -> str:
        """HOST:PORT of the node's link."""

    @abstractmethod
    async def _peers_of(self, node: str) -> dict[str, str]:
        """Every node's link address, as `node` is told it."""

    @abstractmethod
    async def _clean_network(self) -> None: ...

    @abstractmethod
    async def cut(self, lost: frozenset[Pair]) -> None: ...

    def _enter(self, node: str) -> list[str]:
        """What stands before the command that starts a node."""
        return []

    # -- life -------------------------------------------------------------------------------

    @property
    def proxies(self) -> Proxies:
        if self._proxies is None:
            raise ChaosError("The hosts are not open.")
        return self._proxies

    def why_not(self, need: Need) -> str | None:
        if need is Need.CLOCK and instruments.faketime_library() is None:
            return "libfaketime is not installed: apt install faketime"
        if need is Need.FAILING_CALLS and instruments.fiu_libraries() is None:
            return "libfiu is not installed: apt install fiu-utils"
        if need is Need.NEW_NODES:
            return "every connection has a proxy made before the start; use --hosts namespaces"
        if need is Need.SMALL_DISK and os.geteuid() != 0:
            return "mounting a small disk needs root: run with sudo"
        return None

    async def open(self, equip: frozenset[Need], seconds: float = 60.0) -> None:
        self._small_disk_bytes = SMALL_DISK_BYTES + int(seconds * SMALL_DISK_BYTES_PER_S)
        self._pipe = os.pipe()
        self._equip = equip
        self._proxies = Proxies(*await self._server.start())
        await self._prepare_network()
        authority = self.folder / "ca"
        settings.certificates(authority, self.nodes)
        for node in self.nodes:
            listening = await self.proxies.create(f"http-{node}", self._listen(node))
            self._client_urls[node] = f"http://{listening}"
        for node in self.nodes:
            place = Place(
                node,
                self.folder / node,
                self._listen(node),
                self._peer_listen(node),
                await self._peers_of(node),
                dict(self._client_urls),
            )
            self._places[node] = place
            (place.folder / "disk").mkdir(parents=True)
            if Need.SMALL_DISK in equip:
                await self._mount(place.folder / "disk")
            self._processes[node] = self._process(place, authority, equip)
        for node in self.nodes:
            await self.start(node)

    async def _mount(self, folder: Path) -> None:
        options = f"size={self._small_disk_bytes},mode=0700"
        await shell.run(["mount", "-t", "tmpfs", "-o", options, "agentmem-chaos", str(folder)])
        self._mounted.append(folder)

    def _process(
        self, place: Place, authority: Path, equip: frozenset[Need], joining: tuple[str, ...] = ()
    ) -> NodeProcess:
        """`joining`: further arguments of a node that joins."""
        extra: dict[str, str] = {}
        preloaded: list[Path] = []
        if Need.CLOCK in equip:
            library = instruments.faketime_library()
            assert library is not None
            clock = self._clocks[place.node] = instruments.LyingClock(place.folder)
            extra |= clock.environment()
            preloaded.append(library)
        if Need.FAILING_CALLS in equip:
            libraries = instruments.fiu_libraries()
            assert libraries is not None
            calls = self._calls[place.node] = instruments.FailingCalls(place.folder)
            extra |= calls.environment()
            preloaded += libraries
        command = [*self._enter(place.node), *settings.command()]
        if preloaded:
            # By `env`: what enters the namespace before it must not be instrumented.
            names = ":".join(map(str, preloaded))
            command = [*self._enter(place.node), "env", f"LD_PRELOAD={names}"]
            command += settings.command()
        command += joining
        variables = settings.environment(place, authority, self.api_key, extra, joins=bool(joining))
        return NodeProcess(place.node, command, variables, place.folder / "node.log")

    async def close(self) -> None:
        await asyncio.gather(*(process.kill() for process in self._processes.values()))
        await self._server.stop()
        await self._clean_network()
        for folder in self._mounted:
            await shell.run(["umount", "-l", str(folder)], check=False)
        self._mounted.clear()
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def discard_data(self) -> None:
        """Remove the data directories, and keep the logs."""
        for place in self._places.values():
            shutil.rmtree(place.folder / "disk", ignore_errors=True)

    def url(self, node: str) -> str:
        return f"http://{self._listen(node)}"

    def client_url(self, node: str) -> str:
        return self._client_urls[node]

    # -- processes --------------------------------------------------------------------------

    def process(self, node: str) -> NodeProcess:
        return self._processes[node]

    async def join(self, token: str) -> str:
        raise ChaosError(f"New nodes: {self.why_not(Need.NEW_NODES)}.")

    def is_running(self, node: str) -> bool:
        return self._processes[node].is_running

    async def start(self, node: str) -> None:
        if self._pipe is None:
            raise ChaosError("The hosts are not open.")
        self._processes[node].start(self._pipe[0])

    async def stop(self, node: str) -> None:
        await self._processes[node].stop()

    async def kill(self, node: str) -> None:
        await self._processes[node].kill()

    async def pause(self, node: str) -> None:
        self._processes[node].signal(signal.SIGSTOP)

    async def resume(self, node: str) -> None:
        self._processes[node].signal(signal.SIGCONT)

    def log(self, node: str) -> str:
        return self._processes[node].log_text()

    def exit_code(self, node: str) -> int | None:
        return self._processes[node].exit_code

    def log_tail(self, node: str) -> str:
        return self._processes[node].log_tail()

    # -- network ----------------------------------------------------------------------------

    async def peer_toxic(
        self, pair: Pair, kind: str, attributes: Mapping[str, int], toxicity: float = 1.0
    ) -> None:
        raise ChaosError(f"Hosts of kind {self.kind} have no proxy between nodes.")

    async def client_toxic(
        self,
        node: str,
        kind: str,
        stream: str,
        attributes: Mapping[str, int],
        toxicity: float = 1.0,
    ) -> None:
        await self.proxies.poison(f"http-{node}", kind, stream, attributes, toxicity)

    async def clear_toxics(self) -> None:
        await self.proxies.cure_all()

    # -- the machine ------------------------------------------------------------------------

    def data_dir(self, node: str) -> Path:
        return self._places[node].data

    def disk(self, node: str) -> Path:
        return self._places[node].folder / "disk"

    async def set_clock(self, node: str, offset_s: float) -> None:
        self._clocks[node].set(offset_s)

    async def fail_calls(self, node: str, point: str, probability: float, errno: int) -> None:
        pid = self._processes[node].pid
        await self._calls[node].switch(pid, point, probability, errno)
