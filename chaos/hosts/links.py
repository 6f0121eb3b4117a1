"""Connections between nodes that go through a proxy: cuts and toxics on each direction.

Of two nodes the one whose id sorts first dials, so a pair has one connection and one proxy; the
direction of a stream says who sends.
"""

from __future__ import annotations

from collections.abc import Mapping

from agentmem_chaos.hosts.base import Pair
from agentmem_chaos.hosts.proxies import Proxies


def link_of(pair: Pair) -> tuple[str, str]:
    """(the proxy of a pair of nodes, the stream in which the first sends to the second)."""
    first, second = sorted(pair)
    return f"link-{first}-{second}", "upstream" if pair[0] == first else "downstream"


def link_names(nodes: tuple[str, ...]) -> list[str]:
    return [link_of((a, b))[0] for a in nodes for b in nodes if a < b]


class Links:
    """The proxies between nodes. A cut is a black hole: bytes are lost, connections stay open."""

    def __init__(self) -> None:
        self._cut: set[tuple[str, str]] = set()

    async def cut(self, proxies: Proxies, lost: frozenset[Pair]) -> None:
        """From now on exactly these bytes are lost."""
        wanted = {link_of(pair) for pair in lost}
        for name, stream in sorted(self._cut - wanted):
            await proxies.cure(name, "timeout", stream)
            self._cut.discard((name, stream))
        for name, stream in sorted(wanted - self._cut):
            await proxies.poison(name, "timeout", stream, {"timeout": 0})
            self._cut.add((name, stream))

    async def poison(
        self,
        proxies: Proxies,
        pair: Pair,
        kind: str,
        attributes: Mapping[str, int],
        toxicity: float,
    ) -> None:
        name, stream = link_of(pair)
        await proxies.poison(name, kind, stream, attributes, toxicity)

    def cleared(self) -> None:
        """Every toxic of every proxy was removed."""
        self._cut.clear()
