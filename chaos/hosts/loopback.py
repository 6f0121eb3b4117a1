"""Nodes on 127.0.0.1, every connection between them through a proxy: needs no rights at all.

Of two nodes the one whose id sorts first dials, so a pair has one connection and one proxy; the
direction of a stream says who sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agentmem_chaos.hosts.base import Pair
from agentmem_chaos.hosts.local import LocalHosts
from agentmem_node.cli.devlayout import NodeFiles, free_port, layout


def link_of(pair: Pair) -> tuple[str, str]:
    """(the proxy of a pair of nodes, the stream in which the first sends to the second)."""
    first, second = sorted(pair)
    return f"link-{first}-{second}", "upstream" if pair[0] == first else "downstream"


class LoopbackHosts(LocalHosts):
    kind = "loopback"

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, count)
        self._files: dict[str, NodeFiles] = {}
        self._links: dict[str, str] = {}
        self._cut: set[tuple[str, str]] = set()

    async def _prepare_network(self) -> None:
        count = len(self.nodes)
        self._files = {file.id: file for file in layout(self.folder, count, free_port(count))}
        for first in self.nodes:
            for second in self.nodes:
                if first < second:
                    name, _ = link_of((first, second))
                    upstream = self._peer_listen(second)
                    self._links[name] = await self.proxies.create(name, upstream)

    async def _clean_network(self) -> None:
        self._cut.clear()

    def _listen(self, node: str) -> str:
        return f"127.0.0.1:{self._files[node].port}"

    def _peer_listen(self, node: str) -> str:
        return self._files[node].peer

    async def _peers_of(self, node: str) -> dict[str, str]:
        return {
            other: self._links[link_of((node, other))[0]]
            if node < other
            else self._peer_listen(other)
            for other in self.nodes
        }

    async def cut(self, lost: frozenset[Pair]) -> None:
        wanted = {link_of(pair) for pair in lost}
        for name, stream in sorted(self._cut - wanted):
            await self.proxies.cure(name, "timeout", stream)
        for name, stream in sorted(wanted - self._cut):
            await self.proxies.poison(name, "timeout", stream, {"timeout": 0})
        self._cut = wanted

    async def peer_toxic(
        self, pair: Pair, kind: str, attributes: Mapping[str, int], toxicity: float = 1.0
    ) -> None:
        name, stream = link_of(pair)
        await self.proxies.poison(name, kind, stream, attributes, toxicity)

    async def clear_toxics(self) -> None:
        await super().clear_toxics()
        self._cut.clear()
