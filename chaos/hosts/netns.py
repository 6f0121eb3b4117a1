"""Network namespaces joined by a bridge, and the rules that cut them apart. Needs root.

    bridge amcRRRR  10.201.K.254/24        this machine
      |-- n1   10.201.K.1                  its own namespace, am-chaos-RRRR-n1
      |-- n2   10.201.K.2
      `-- n3   10.201.K.3

A cut is a DROP rule where the receiver's packets come in, so nobody is told: what was sent just
never arrives. The machine itself reaches every node at any time, as a client would.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts import shell
from agentmem_chaos.hosts.base import Pair

NETWORK = "10.201"
_GATEWAY = 254


class Network:
    """Names are unique to a run, so that several runs and leftovers never meet."""

    def __init__(self, nodes: tuple[str, ...]) -> None:
        self._nodes = nodes
        self._run = secrets.token_hex(3)
        self.bridge = f"amc{self._run}"
        self._subnet = 0
        self._made: list[str] = []
        self._bridged = False
        self._cut: frozenset[Pair] = frozenset()

    def namespace(self, node: str) -> str:
        return f"am-chaos-{self._run}-{node}"

    def address(self, node: str) -> str:
        return f"{NETWORK}.{self._subnet}.{self._nodes.index(node) + 1}"

    async def make(self) -> None:
        """Raises ChaosError; `remove` cleans up whatever was made until then."""
        self._subnet = await self._free_subnet()
        await shell.run(["ip", "link", "add", self.bridge, "type", "bridge"])
        self._bridged = True
        gateway = f"{NETWORK}.{self._subnet}.{_GATEWAY}/24"
        await shell.run(["ip", "address", "add", gateway, "dev", self.bridge])
        await shell.run(["ip", "link", "set", self.bridge, "up"])
        for number, node in enumerate(self._nodes):
            await self._add(number, node)

    async def add(self, node: str) -> None:
        """A further node. Raises ChaosError."""
        self._nodes = (*self._nodes, node)
        await self._add(len(self._nodes) - 1, node)

    async def _free_subnet(self) -> int:
        used = (await shell.run(["ip", "-o", "-4", "address"])).stdout
        for subnet in range(1, 255):
            if f" {NETWORK}.{subnet}." not in used:
                return subnet
        raise ChaosError(f"No free network was found below {NETWORK}.0.0.")

    async def _add(self, number: int, node: str) -> None:
        name = self.namespace(node)
        here, there = f"{self.bridge}-{number}", "eth0"
        await shell.run(["ip", "netns", "add", name])
        self._made.append(name)
        pair = ("type", "veth", "peer", "name", there, "netns", name)
        await shell.run(["ip", "link", "add", here, *pair])
        await shell.run(["ip", "link", "set", here, "master", self.bridge, "up"])
        address = f"{self.address(node)}/24"
        await shell.run(["ip", "-n", name, "address", "add", address, "dev", there])
        await shell.run(["ip", "-n", name, "link", "set", there, "up"])
        await shell.run(["ip", "-n", name, "link", "set", "lo", "up"])

    async def cut(self, lost: frozenset[Pair]) -> None:
        """From now on exactly these packets are lost.

        Nothing lost: every rule goes, those too of which an interrupted call was not told.
        """
        if not lost:
            for node in self._nodes:
                enter = ("ip", "netns", "exec", self.namespace(node))
                await shell.run([*enter, "iptables", "-w", "5", "-F", "INPUT"])
            self._cut = frozenset()
            return
        for sender, receiver in sorted(self._cut - lost):
            await self._rule("-D", sender, receiver)
            self._cut -= {(sender, receiver)}
        for sender, receiver in sorted(lost - self._cut):
            await self._rule("-A", sender, receiver)
            self._cut |= {(sender, receiver)}

    async def _rule(self, what: str, sender: str, receiver: str) -> None:
        rule = ("INPUT", "-s", self.address(sender), "-j", "DROP")
        enter = ("ip", "netns", "exec", self.namespace(receiver))
        await shell.run([*enter, "iptables", "-w", "5", what, *rule])

    async def remove(self) -> None:
        """Everything that `make` made. Never raises: what is gone already is fine."""
        # The kernel takes a namespace down later than it says; an interface goes at once, and with
        # it the other one of its pair.
        for number in range(len(self._made)):
            await shell.run(["ip", "link", "delete", f"{self.bridge}-{number}"], check=False)
        for name in self._made:
            await shell.run(["ip", "netns", "delete", name], check=False)
        if self._bridged:
            await shell.run(["ip", "link", "delete", self.bridge], check=False)
        self._made.clear()
        self._bridged = False
        self._cut = frozenset()


def missing_tools(tools: Iterable[str] = ("ip", "iptables")) -> str | None:
    """What to install, or None."""
    absent = [tool for tool in tools if not shell.have(tool)]
    packages = {"ip": "iproute2", "iptables": "iptables"}
    if not absent:
        return None
    return f"{' and '.join(absent)} missing: apt install {' '.join(packages[t] for t in absent)}"
