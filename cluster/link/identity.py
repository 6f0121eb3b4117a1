"""Who a certificate says a node is: the URI agentmem://<cluster>/<node> among its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

_SCHEME = "agentmem://"


def node_uri(cluster: str, node_id: str) -> str:
    return f"{_SCHEME}{quote(cluster, safe='')}/{quote(node_id, safe='')}"


@dataclass(frozen=True, slots=True)
class Identity:
    cluster: str
    node_id: str


def identity_of(certificate: Mapping[str, Any] | None) -> Identity | None:
    """The identity in what `SSLObject.getpeercert` returns; None unless there is exactly one."""
    names = (certificate or {}).get("subjectAltName", ())
    found = [
        uri.removeprefix(_SCHEME)
        for kind, uri in names
        if kind == "URI" and uri.startswith(_SCHEME)
    ]
    if len(found) != 1 or found[0].count("/") != 1:
        return None
    cluster, node_id = (unquote(part) for part in found[0].split("/"))
    return Identity(cluster, node_id) if cluster and node_id else None
