"""A development authority: certificates for the nodes of one cluster, made without any tool.

    ca.crt, ca.key          the authority; whoever holds ca.key can make nodes
    <node>.crt, <node>.key  one node; its name is the URI agentmem://<cluster>/<node>

In production the certificates may come from elsewhere, with the same URI in them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentmem_cluster.link.identity import node_uri
from agentmem_cluster.realtime import RealClock
from agentmem_cluster.runtime import Clock

_VALID_DAYS = 3650
# Clocks of machines differ; a certificate must not be "not yet valid" on the slower one.
_BACKDATED = timedelta(days=1)


def create_ca(folder: str | Path, cluster: str = "agentmem", *, clock: Clock | None = None) -> None:
    """Make the authority of a cluster, unless the folder has one."""
    folder = Path(folder)
    if (folder / "ca.crt").exists() and (folder / "ca.key").exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{cluster} development authority", cluster)
    certificate = (
        _builder(name, name, key.public_key(), clock)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _pem_key(key))
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def issue(folder: str | Path, node_id: str, *, clock: Clock | None = None) -> None:
    """Make a node's certificate and key, unless it has them. Needs `create_ca` first."""
    folder = Path(folder)
    if (folder / f"{node_id}.crt").exists() and (folder / f"{node_id}.key").exists():
        return
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    cluster = str(authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(node_uri(cluster, node_id))]
    )
    both_ways = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(_name(node_id, cluster), authority.subject, key.public_key(), clock)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ways), critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder / f"{node_id}.key", _pem_key(key))
    _write(folder / f"{node_id}.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _name(common: str, cluster: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, clock: Clock | None
) -> x509.CertificateBuilder:
    today = datetime.fromtimestamp((clock or RealClock()).wall_ms() / 1000, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - _BACKDATED)
        .not_valid_after(today + timedelta(days=_VALID_DAYS))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and never readable by others, not even while it is written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
