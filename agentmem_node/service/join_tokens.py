"""Join tokens: what an operator hands to a new node, and what the cluster keeps of each.

A token is a name and a secret. The secret never travels: both sides derive a key from it, the
joiner proves with it that it was let in, and the cluster that it is the one which made the token.
Both proofs are over the very bytes that were sent, so that nothing can be read in two ways.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import Any, Final, Literal

import msgpack

from agentmem_cluster.errors import Forbidden
from agentmem_cluster.runtime import Rng

# Where the meta group keeps them, by the token's id.
KEPT_UNDER: Final = "join/"
_PREFIX: Final = "amj_"
_ID_BYTES: Final = 8
_SECRET_BYTES: Final = 32
_CHECK_BYTES: Final = 3  # with them the whole is 43 bytes: 69 characters
_TEXT_CHARS: Final = 69
_FORMAT: Final = 1
# How long after its end a token is known, so that its holder is told what is wrong with it.
_REMEMBERED_MS: Final = 24 * 3600 * 1000


class BadToken(ValueError):
    """The text is no join token."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    id: str  # 16 hexadecimal digits
    secret: bytes = field(repr=False)

    @classmethod
    def draw(cls, rng: Rng) -> JoinToken:
        return cls(rng.token(_ID_BYTES).hex(), rng.token(_SECRET_BYTES))

    def __str__(self) -> str:
        body = bytes.fromhex(self.id) + self.secret
        text = base64.b32encode(body + _checksum(body)).decode().rstrip("=").lower()
        return f"{_PREFIX}{text}"

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises BadToken, for a token that was not copied whole, too."""
        text = text.strip()
        encoded = text.removeprefix(_PREFIX)
        if encoded == text or len(encoded) != _TEXT_CHARS:
            raise BadToken(
                f"A join token is {_PREFIX!r} and {_TEXT_CHARS} letters and digits: copy it whole."
            )
        try:
            data = base64.b32decode(encoded.upper() + "=" * (-len(encoded) % 8))
        except (binascii.Error, ValueError):
            raise BadToken("The join token has characters that none has: copy it again.") from None
        body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if _checksum(body) != check:
            raise BadToken("The join token has a typing error: copy it again.")
        return cls(body[:_ID_BYTES].hex(), body[_ID_BYTES:])

    @property
    def key(self) -> bytes:
        """What both sides prove things with. The secret cannot be found from it."""
        return blake2b(self.secret, digest_size=32, person=b"agentmem join").digest()


def proof_of_request(key: bytes, payload: str) -> str:
    """By the joiner: hexadecimal digits."""
    return _proof(key, "request", payload)


def proof_of_answer(key: bytes, nonce: str, payload: str) -> str:
    """By the cluster. `nonce` of the request: an answer that was recorded proves nothing."""
    return _proof(key, f"answer {nonce}", payload)


def is_proof(expected: str, given: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(expected.encode(), given.encode())


def _proof(key: bytes, of: str, payload: str) -> str:
    return hmac.new(key, f"agentmem join 1 {of}\0{payload}".encode(), sha256).hexdigest()


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECK_BYTES, person=b"agentmem token").digest()


@dataclass(frozen=True, slots=True)
class Joined:
    """Who used a token: the same node may ask again, with the same key and the same disk."""

    key_hash: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class KeptToken:
    """What the meta group keeps of a token. `node`: the only id that it lets in, if any."""

    key: bytes = field(repr=False)
    expires_ms: int
    node: str | None
    uses: int
    joined: dict[str, Joined]

    def to_bytes(self) -> bytes:
        packed: bytes = msgpack.packb(
            {
                "format": _FORMAT,
                "key": self.key,
                "expires_ms": self.expires_ms,
                "node": self.node,
                "uses": self.uses,
                "joined": {n: [j.key_hash, j.incarnation] for n, j in self.joined.items()},
            }
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> KeptToken:
        """Raises ValueError."""
        try:
            kept: Any = msgpack.unpackb(data)
            if kept["format"] != _FORMAT:
                raise ValueError(f"a join token of format {kept['format']}")
            return cls(
                bytes(kept["key"]),
                int(kept["expires_ms"]),
                kept["node"],
                int(kept["uses"]),
                {str(node): Joined(*row) for node, row in kept["joined"].items()},
            )
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as wrong:
            raise ValueError(f"a join token cannot be read: {wrong!r}") from wrong

    def is_forgotten(self, now_ms: int) -> bool:
        return now_ms > self.expires_ms + _REMEMBERED_MS

    def state(self, now_ms: int) -> Literal["open", "used_up", "expired"]:
        """Used up: those whom it has let in may ask again."""
        if now_ms >= self.expires_ms:
            return "expired"
        return "open" if len(self.joined) < self.uses else "used_up"

    def after(self, node: str, who: Joined, now_ms: int) -> KeptToken:
        """This token once `node` has used it. Raises Forbidden when it may not."""
        again = "Make another one with `agentmem cluster join-token`."
        if now_ms >= self.expires_ms:
            late_s = (now_ms - self.expires_ms) / 1000
            raise Forbidden(f"The join token expired {late_s:,.0f} s ago.", hint=again)
        if self.node is not None and self.node != node:
            raise Forbidden(
                f"The join token lets node {self.node} in, not {node}.",
                hint=f"Join with --id {self.node}, or make a token with --node {node}.",
            )
        if self.joined.get(node) == who:
            return self
        if node in self.joined or len(self.joined) >= self.uses:
            users = ", ".join(sorted(self.joined))
            raise Forbidden(
                f"The join token is used up: it has let {users} in.",
                hint=f"To repeat a join, keep the data directory that it began with. {again}",
            )
        return KeptToken(
            self.key, self.expires_ms, self.node, self.uses, {**self.joined, node: who}
        )
