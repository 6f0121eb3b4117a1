"""Nodes in network namespaces of their own: cuts lose packets, as a broken switch does."""

from __future__ import annotations

import os
from pathlib import Path

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Need, Pair
from agentmem_chaos.hosts.local import LocalHosts
from agentmem_chaos.hosts.netns import Network, missing_tools
from agentmem_chaos.hosts.settings import Place

HTTP_PORT = 7700
PEER_PORT = 7800


class NamespaceHosts(LocalHosts):
    kind = "namespaces"

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, count)
        self._network = Network(self.nodes)

    def why_not(self, need: Need) -> str | None:
        if need is Need.PEER_PROXY:
            return "nodes are joined without a proxy; use --hosts loopback"
        if need is Need.NEW_NODES:
            return None
        return super().why_not(need)

    async def _prepare_network(self) -> None:
        if os.geteuid() != 0:
            raise ChaosError("Network namespaces need root: run with sudo, or --hosts loopback.")
        if (absent := missing_tools()) is not None:
            raise ChaosError(f"Network namespaces need more tools: {absent}.")
        await self._network.make()

    async def join(self, token: str) -> str:
        node = f"n{len(self.nodes) + 1}"
        await self._network.add(node)
        place = Place(node, self.folder / node, self._listen(node), self._peer_listen(node), {}, {})
        self._places[node] = place
        (place.folder / "disk").mkdir(parents=True)
        if Need.SMALL_DISK in self._equip:
            await self._mount(place.folder / "disk")
        listening = await self.proxies.create(f"http-{node}", self._listen(node))
        self._client_urls[node] = f"http://{listening}"
        seeds = ",".join(self.url(other) for other in self.nodes)
        joining = ("--join", token, "--at", seeds, "--id", node, "--data", str(place.data))
        listens = ("--listen", place.listen, "--peer-listen", place.peer_listen)
        self._processes[node] = self._process(
            place, self.folder / "ca", self._equip, (*joining, *listens)
        )
        await self.start(node)
        self.nodes = (*self.nodes, node)
        return node

    async def _clean_network(self) -> None:
        await self._network.remove()

    def _enter(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", self._network.namespace(node)]

    def _listen(self, node: str) -> str:
        return f"{self._network.address(node)}:{HTTP_PORT}"

    def _peer_listen(self, node: str) -> str:
        return f"{self._network.address(node)}:{PEER_PORT}"

    async def _peers_of(self, node: str) -> dict[str, str]:
        return {other: self._peer_listen(other) for other in self.nodes}

    async def cut(self, lost: frozenset[Pair]) -> None:
        await self._network.cut(lost)

    async def clear_toxics(self) -> None:
        await super().clear_toxics()
        await self._network.cut(frozenset())
