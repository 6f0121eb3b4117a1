"""Join tokens: what they let in, and what each side can prove with one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import Forbidden
from agentmem_cluster.link.ca import (
    Authority,
    check_certificate,
    create_ca,
    issue,
    request_certificate,
)
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.realtime import RealRng
from agentmem_node.service.join_tokens import (
    BadToken,
    Joined,
    JoinToken,
    KeptToken,
    is_proof,
    proof_of_answer,
    proof_of_request,
)

HOUR_MS = 3_600_000
DISK = Joined("k" * 64, "a" * 24)


def kept(**more: object) -> KeptToken:
    fields: dict[str, object] = {"expires_ms": HOUR_MS, "node": None, "uses": 1, "joined": {}}
    return KeptToken(key=b"k" * 32, **(fields | more))  # type: ignore[arg-type]


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=32, max_size=32))
def test_a_token_is_read_back_from_its_text(token_id: bytes, secret: bytes) -> None:
    token = JoinToken(token_id.hex(), secret)
    assert JoinToken.parse(f"  {token}\n") == token
    assert secret.hex() not in repr(token)


@given(st.data())
def test_a_token_with_one_wrong_character_is_noticed_before_anybody_is_asked(
    data: st.DataObject,
) -> None:
    text = str(JoinToken("0123456789abcdef", bytes(range(32))))
    place = data.draw(st.integers(4, len(text) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    changed = text[:place] + letter + text[place + 1 :]
    if changed[:-1] == text[:-1]:
        return  # the last character has bits that mean nothing
    with pytest.raises(BadToken):
        JoinToken.parse(changed)


@pytest.mark.parametrize("text", ["", "amj_", "am_" + "a" * 69, "amj_" + "0" * 69])
def test_other_texts_are_no_tokens(text: str) -> None:
    with pytest.raises(BadToken):
        JoinToken.parse(text)


def test_each_proof_is_for_one_key_one_nonce_one_text_and_one_direction() -> None:
    key, other = JoinToken.draw(RealRng()).key, JoinToken.draw(RealRng()).key
    proof = proof_of_answer(key, "n1", "text")
    assert is_proof(proof, proof_of_answer(key, "n1", "text"))
    for wrong in (
        proof_of_answer(other, "n1", "text"),
        proof_of_answer(key, "n2", "text"),
        proof_of_answer(key, "n1", "texts"),
        proof_of_request(key, "text"),
        "",
    ):
        assert not is_proof(proof, wrong)


def test_what_the_cluster_keeps_is_read_back_and_holds_no_secret() -> None:
    token = JoinToken.draw(RealRng())
    first = KeptToken(token.key, 5, "n4", 2, {"n4": DISK})
    assert KeptToken.from_bytes(first.to_bytes()) == first
    assert token.secret not in first.to_bytes()
    for damaged in (b"", b"\xc0", b"\x80"):
        with pytest.raises(ValueError, match="join token"):
            KeptToken.from_bytes(damaged)


def test_a_token_lets_in_as_many_as_it_says_and_each_again() -> None:
    once = kept().after("n4", DISK, 0)
    assert once.after("n4", DISK, HOUR_MS - 1) == once
    with pytest.raises(Forbidden, match="used up: it has let n4 in"):
        once.after("n5", DISK, 0)
    twice = kept(uses=2).after("n4", DISK, 0).after("n5", DISK, 0)
    assert set(twice.joined) == {"n4", "n5"}
    with pytest.raises(Forbidden, match="used up"):
        twice.after("n6", DISK, 0)


@pytest.mark.parametrize("other", [Joined("x" * 64, "a" * 24), Joined("k" * 64, "b" * 24)])
def test_a_used_token_lets_nobody_else_be_its_node(other: Joined) -> None:
    with pytest.raises(Forbidden, match="used up"):
        kept(uses=5).after("n4", DISK, 0).after("n4", other, 0)


def test_a_token_ends_and_says_when() -> None:
    with pytest.raises(Forbidden, match="expired 60 s ago"):
        kept().after("n4", DISK, HOUR_MS + 60_000)
    with pytest.raises(Forbidden, match="expired 0 s ago"):
        kept().after("n4", DISK, HOUR_MS)


def test_a_token_is_open_until_it_is_used_up_or_ends() -> None:
    two = kept(uses=2)
    assert (two.state(0), two.state(HOUR_MS)) == ("open", "expired")
    used = two.after("n4", DISK, 0)
    assert used.state(0) == "open"
    used = used.after("n5", DISK, 0)
    assert (used.state(0), used.state(HOUR_MS)) == ("used_up", "expired")


def test_a_token_for_one_node_lets_no_other_in() -> None:
    with pytest.raises(Forbidden, match="lets node n4 in, not n5"):
        kept(node="n4").after("n5", DISK, 0)


# -- certificates of nodes that ask for one -------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ca")
    create_ca(made, "north")
    return made


def test_a_signed_request_is_the_certificate_of_the_approved_node(
    folder: Path, tmp_path: Path
) -> None:
    csr = request_certificate(tmp_path / "n4.key", "n4")
    assert (tmp_path / "n4.key").stat().st_mode & 0o777 == 0o600
    authority = Authority.load(folder / "ca.crt", folder / "ca.key")
    certificate = authority.sign_request("north", "n4", csr)
    check_certificate((folder / "ca.crt").read_text(), certificate, csr)
    (tmp_path / "n4.crt").write_text(certificate)
    (tmp_path / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    assert LinkTls.load_folder(tmp_path, "north", "n4").identity.node_id == "n4"


def test_a_request_made_for_another_node_is_not_signed(folder: Path, tmp_path: Path) -> None:
    csr = request_certificate(tmp_path / "n5.key", "n5")
    authority = Authority.load(folder / "ca.crt", folder / "ca.key")
    with pytest.raises(ValueError, match="not for 'n4'"):
        authority.sign_request("north", "n4", csr)


def test_a_request_without_the_key_that_it_names_is_not_signed(
    folder: Path, tmp_path: Path
) -> None:
    import base64

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    csr = x509.load_pem_x509_csr(request_certificate(tmp_path / "n4.key", "n4").encode())
    data = bytearray(csr.public_bytes(Encoding.DER))
    data[-1] ^= 1  # the end of the signature
    text = base64.encodebytes(bytes(data)).decode()
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"
    authority = Authority.load(folder / "ca.crt", folder / "ca.key")
    with pytest.raises(ValueError, match="not made with the key"):
        authority.sign_request("north", "n4", pem)


def test_names_that_a_request_brings_do_not_count(folder: Path, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n4")]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("agentmem://north/n1")]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority = Authority.load(folder / "ca.crt", folder / "ca.key")
    pem = greedy.public_bytes(serialization.Encoding.PEM).decode()
    made = x509.load_pem_x509_certificate(authority.sign_request("north", "n4", pem).encode())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["agentmem://north/n4"]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_key_of_another_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    create_ca(tmp_path, "north")
    with pytest.raises(ValueError, match="is not the key of"):
        Authority.load(folder / "ca.crt", tmp_path / "ca.key")
    issue(tmp_path, "n4")
    csr = request_certificate(tmp_path / "n4.key", "n4")
    theirs = (tmp_path / "n4.crt").read_text()
    with pytest.raises(ValueError, match="not signed by the authority"):
        check_certificate((folder / "ca.crt").read_text(), theirs, csr)
