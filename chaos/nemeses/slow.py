"""What a proxy does to connections: slow, narrow, cut in the middle, reset."""

from __future__ import annotations

from typing import ClassVar

from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.base import Field, Nemesis

# The share of connections that an answer's loss befalls: all of them would leave nothing to see.
CUT_SHARE = 0.5


class _Toxic(Nemesis):
    async def undo(self, field: Field) -> None:
        await field.hosts.clear_toxics()


class Latency(_Toxic):
    name: ClassVar[str] = "latency"
    description: ClassVar[str] = "100 to 300 ms of round trip, with jitter, to a leader's peers"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PEER_PROXY})

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        delay_ms = field.chance.randint(50, 150)
        self.victims = frozenset({node})
        for other in field.nodes:
            if other != node:
                for pair in ((node, other), (other, node)):
                    attributes = {"latency": delay_ms, "jitter": delay_ms // 3}
                    await field.hosts.peer_toxic(pair, "latency", attributes)
        return f"{2 * delay_ms} ms round trip to {node}"


class Bandwidth(_Toxic):
    name: ClassVar[str] = "bandwidth"
    description: ClassVar[str] = "a few KB/s on every connection to a node's peers"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PEER_PROXY})

    async def strike(self, field: Field) -> str:
        node = field.a_node()
        rate = field.chance.choice((4, 16, 64))
        self.victims = frozenset({node})
        for other in field.nodes:
            if other != node:
                for pair in ((node, other), (other, node)):
                    await field.hosts.peer_toxic(pair, "bandwidth", {"rate": rate})
        return f"{rate} KB/s to {node}"


class CutAfterSend(_Toxic):
    """The request arrives and takes effect, the answer is lost: what makes retries dangerous."""

    name: ClassVar[str] = "cut-after-send"
    description: ClassVar[str] = "clients' requests arrive, half of the connections lose the answer"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLIENT_PROXY})

    async def strike(self, field: Field) -> str:
        self.victims = frozenset(field.nodes)
        for node in field.nodes:
            attributes = {"bytes": field.chance.choice((0, 0, 100))}
            await field.hosts.client_toxic(node, "limit_data", "downstream", attributes, CUT_SHARE)
        return "answers to clients are lost"


class PeerCutAfterSend(_Toxic):
    name: ClassVar[str] = "peer-cut-after-send"
    description: ClassVar[str] = "connections between nodes break after some kilobytes"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PEER_PROXY})

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        self.victims = frozenset({node})
        for other in field.nodes:
            if other != node:
                size = field.chance.choice((2_000, 8_000, 32_000))
                await field.hosts.peer_toxic((node, other), "limit_data", {"bytes": size})
        return f"connections of {node} break after some kilobytes"


class ResetPeers(_Toxic):
    name: ClassVar[str] = "reset-peers"
    description: ClassVar[str] = "connections of a node are reset (TCP RST) again and again"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PEER_PROXY})

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        self.victims = frozenset({node})
        for other in field.nodes:
            if other != node:
                after_ms = field.chance.choice((0, 200, 1_000))
                await field.hosts.peer_toxic((node, other), "reset_peer", {"timeout": after_ms})
        return f"connections of {node} are reset"
