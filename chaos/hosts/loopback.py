"""Nodes on 127.0.0.1, every connection through a proxy: needs no rights at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agentmem_chaos.hosts.base import Pair
from agentmem_chaos.hosts.links import Links, link_of
from agentmem_chaos.hosts.local import LocalHosts
from agentmem_node.cli.devlayout import NodeFiles, free_port, layout


class LoopbackHosts(LocalHosts):
    kind = "loopback"

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, count)
        self._files: dict[str, NodeFiles] = {}
        self._links = Links()
        self._link_addresses: dict[str, str] = {}

    async def _prepare_network(self) -> None:
        count = len(self.nodes)
        self._files = {file.id: file for file in layout(self.folder, count, free_port(count))}
        for first in self.nodes:
            for second in self.nodes:
                if first < second:
                    name, _ = link_of((first, second))
                    upstream = self._peer_listen(second)
                    self._link_addresses[name] = await self.proxies.create(name, upstream)

    async def _clean_network(self) -> None:
        self._links.cleared()

    def _listen(self, node: str) -> str:
        return f"127.0.0.1:{self._files[node].port}"

    def _peer_listen(self, node: str) -> str:
        return self._files[node].peer

    async def _peers_of(self, node: str) -> dict[str, str]:
        return {
            other: self._link_addresses[link_of((node, other))[0]]
            if node < other
            else self._peer_listen(other)
            for other in self.nodes
        }

    async def cut(self, lost: frozenset[Pair]) -> None:
        await self._links.cut(self.proxies, lost)

    async def peer_toxic(
        self, pair: Pair, kind: str, attributes: Mapping[str, int], toxicity: float = 1.0
    ) -> None:
        await self._links.poison(self.proxies, pair, kind, attributes, toxicity)

    async def clear_toxics(self) -> None:
        await super().clear_toxics()
        self._links.cleared()
