"""Who a certificate says a node is: the URI agentmem://<cluster>/<node> among its names."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True)
class LinkTls:
    """A node's certificate, and the authority that it trusts: TLS 1.3, both sides verified."""

    identity: Identity
    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, folder: str | Path, node_id: str) -> LinkTls:
        """From a folder of `agentmem_cluster.link.ca`."""
        folder = Path(folder)
        tls = cls.from_files(
            folder / "ca.crt", folder / f"{node_id}.crt", folder / f"{node_id}.key"
        )
        if tls.identity.node_id != node_id:
            raise ValueError(f"{folder / node_id}.crt names node {tls.identity.node_id}")
        return tls

    @classmethod
    def from_files(cls, ca_cert: str | Path, cert: str | Path, key: str | Path) -> LinkTls:
        """Raises OSError, ssl.SSLError included, or ValueError when `cert` names no node."""
        server = _context(ssl.PROTOCOL_TLS_SERVER, ca_cert, cert, key)
        client = _context(ssl.PROTOCOL_TLS_CLIENT, ca_cert, cert, key)
        own = identity_of(_read_certificate(cert))
        if own is None:
            raise ValueError(
                f"{cert} does not name a node: it needs one URI {node_uri('<cluster>', '<node>')}"
            )
        return cls(own, server, client)


def _context(
    protocol: int, ca_cert: str | Path, cert: str | Path, key: str | Path
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A node is known by its URI, which the link compares; addresses of nodes change.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(str(ca_cert))
    context.load_cert_chain(str(cert), str(key))
    return context


def _read_certificate(cert: str | Path) -> dict[str, Any]:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(Path(cert).read_bytes())
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return {}
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return {"subjectAltName": tuple(("URI", uri) for uri in uris)}
