"""A development authority: certificates for the nodes of one cluster, made without any tool.

    ca.crt, ca.key          the authority; whoever holds ca.key can make nodes
    <node>.crt, <node>.key  one node; its name is the URI agentmem://<cluster>/<node>

In production the certificates may come from elsewhere, with the same URI in them.

A node that joins makes its own key, and only asks for a certificate (`request_certificate`);
`Authority` signs it, for the name that was approved and no other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
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
    write_private(folder / "ca.key", _pem_key(key))
    write_private(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def issue(folder: str | Path, node_id: str, *, clock: Clock | None = None) -> None:
    """Make a node's certificate and key, unless it has them. Needs `create_ca` first."""
    folder = Path(folder)
    if (folder / f"{node_id}.crt").exists() and (folder / f"{node_id}.key").exists():
        return
    authority = Authority.load(folder / "ca.crt", folder / "ca.key")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.certify(authority.name, node_id, key.public_key(), clock=clock)
    write_private(folder / f"{node_id}.key", _pem_key(key))
    write_private(folder / f"{node_id}.crt", certificate)


@dataclass(frozen=True, slots=True)
class Authority:
    """What signs certificates of nodes."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, ca_cert: str | Path, ca_key: str | Path) -> Authority:
        """From two PEM files. Raises OSError, and ValueError when they are no authority."""
        certificate = x509.load_pem_x509_certificate(Path(ca_cert).read_bytes())
        try:
            key = serialization.load_pem_private_key(Path(ca_key).read_bytes(), None)
        except TypeError as error:
            raise ValueError(f"{ca_key} is encrypted") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{ca_key} is no key on an elliptic curve")
        if _public(key.public_key()) != _public(certificate.public_key()):
            raise ValueError(f"{ca_key} is not the key of {ca_cert}")
        return cls(certificate, key)

    @property
    def name(self) -> str:
        """The cluster for which `create_ca` made it. Raises ValueError for other authorities."""
        names = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if not names:
            raise ValueError("the authority names no cluster")
        return str(names[0].value)

    def sign_request(
        self, cluster: str, node_id: str, csr_pem: str, *, clock: Clock | None = None
    ) -> str:
        """The certificate of `node_id`, in PEM. Raises ValueError when the request is not its own.

        Of the request only the key is taken: the name is the one that was approved, and extensions
        that the request brings are nobody's business.
        """
        request = read_request(csr_pem, node_id)
        return self.certify(cluster, node_id, request, clock=clock).decode()

    def certify(
        self,
        cluster: str,
        node_id: str,
        key: ec.EllipticCurvePublicKey,
        *,
        clock: Clock | None = None,
    ) -> bytes:
        names = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(node_uri(cluster, node_id))]
        )
        both_ways = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(_name(node_id, cluster), self.certificate.subject, key, clock)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both_ways), critical=False)
            .add_extension(names, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


# -- of a node that asks for a certificate -----------------------------------------------


def request_certificate(key_file: Path, node_id: str) -> str:
    """A request in PEM, made with the key in `key_file`, which is made when it is missing.

    Raises OSError, and ValueError when the file holds no such key.
    """
    if not key_file.exists():
        write_private(key_file, _pem_key(ec.generate_private_key(ec.SECP256R1())))
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{key_file} is no key on an elliptic curve")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def read_request(csr_pem: str, node_id: str) -> ec.EllipticCurvePublicKey:
    """The key for which `node_id` asks a certificate. Raises ValueError."""
    request = x509.load_pem_x509_csr(csr_pem.encode())
    names = [
        str(name.value) for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    if names != [node_id]:
        raise ValueError(f"it is made for {names}, not for {node_id!r}")
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.key_size < 256:
        raise ValueError("its key is not one on an elliptic curve of 256 bits or more")
    if not request.is_signature_valid:
        raise ValueError("it was not made with the key that it names")
    return key


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, in hexadecimal digits."""
    return sha256(_public(key)).hexdigest()


def check_certificate(ca_pem: str, certificate_pem: str, csr_pem: str) -> None:
    """Raises ValueError unless the authority signed this certificate for the key of the request."""
    authority = x509.load_pem_x509_certificate(ca_pem.encode())
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    request = x509.load_pem_x509_csr(csr_pem.encode())
    if _public(certificate.public_key()) != _public(request.public_key()):
        raise ValueError("the certificate is for another key")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, TypeError) as error:
        raise ValueError("the certificate was not signed by the authority") from error


def _public(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


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


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, and never readable by others, not even while it is written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
