"""Keeping strangers' web pages away from a node on this machine.

A node that listens on loopback needs no key, but any page in the user's browser can send
requests to loopback. Browsers name the page's site in `Origin`; and a page that had its own name
resolve to 127.0.0.1 afterwards (DNS rebinding) is given away by the `Host` it asks for.
"""

from __future__ import annotations

import ipaddress

from agentmem_cluster.errors import Forbidden

_HOSTS_REMEMBERED_MAX = 64


class BrowserFence:
    """`keyless`: requests need no API key. Where they do, a stranger's page has none to send."""

    def __init__(self, *, keyless: bool) -> None:
        self._keyless = keyless
        self._good_hosts: set[str] = set()

    def check(self, host: str | None, origin: str | None) -> None:
        """Raises Forbidden. `host` and `origin` are the headers of these names."""
        if not self._keyless:
            return
        if origin is not None and origin.rpartition("//")[2] != host:
            raise Forbidden(
                f"A web page of {origin[:100]!r} may not use this API.",
                hint="Send requests from a program, or from this node's own /docs page.",
            )
        if host is None or host in self._good_hosts:
            return
        if not _is_loopback_name(host):
            raise Forbidden(
                "This node needs no API key and so answers to local names only, not to "
                f"{host[:100]!r}.",
                hint="Use 127.0.0.1 or localhost, or give the node a key (`agentmem key new`).",
            )
        if len(self._good_hosts) < _HOSTS_REMEMBERED_MAX:
            self._good_hosts.add(host)


def _is_loopback_name(host: str) -> bool:
    """Whether `name` or `name:port` means this machine whoever resolves it."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
