"""A node's certificate and the authority that it trusts: TLS 1.3, both sides verified."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem_cluster.link.identity import Identity, identity_of, node_uri


@dataclass(frozen=True, slots=True)
class LinkTls:
    identity: Identity
    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(
        cls,
        ca_cert: str | Path,
        cert: str | Path,
        key: str | Path,
        cluster: str,
        node_id: str,
    ) -> LinkTls:
        """Read three PEM files.

        Raises OSError (ssl.SSLError included) when one cannot be read, and ValueError when the
        certificate is not the one of this node of this cluster.
        """
        server = _context(ssl.PROTOCOL_TLS_SERVER, ca_cert, cert, key)
        client = _context(ssl.PROTOCOL_TLS_CLIENT, ca_cert, cert, key)
        own = identity_of(_read_certificate(cert))
        wanted = node_uri(cluster, node_id)
        if own != Identity(cluster, node_id):
            named = "no node" if own is None else f"{node_uri(own.cluster, own.node_id)}"
            raise ValueError(
                f"The certificate {cert} names {named}, not {wanted}. Give this node its own "
                "certificate, or correct `node.id` and `cluster.name`."
            )
        return cls(own, server, client)

    @classmethod
    def load_folder(cls, folder: str | Path, cluster: str, node_id: str) -> LinkTls:
        """From a folder that `agentmem_cluster.link.ca` made."""
        folder = Path(folder)
        return cls.load(
            folder / "ca.crt",
            folder / f"{node_id}.crt",
            folder / f"{node_id}.key",
            cluster,
            node_id,
        )


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
