"""The kinds of hosts by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agentmem_chaos.hosts.base import Hosts
from agentmem_chaos.hosts.compose import ComposeHosts
from agentmem_chaos.hosts.loopback import LoopbackHosts
from agentmem_chaos.hosts.namespaces import NamespaceHosts


@dataclass(frozen=True, slots=True)
class HostsKind:
    description: str
    make: Callable[[Path, int], Hosts]


HOSTS: dict[str, HostsKind] = {
    "loopback": HostsKind(
        "processes on 127.0.0.1, every connection through a proxy; needs no rights", LoopbackHosts
    ),
    "namespaces": HostsKind(
        "processes in network namespaces, cut apart by iptables; needs root", NamespaceHosts
    ),
    "compose": HostsKind(
        "containers of docker-compose.cluster.yml and the real Toxiproxy; needs Docker",
        ComposeHosts,
    ),
}


def make_hosts(kind: str, folder: Path, nodes: int) -> Hosts:
    return HOSTS[kind].make(folder, nodes)
