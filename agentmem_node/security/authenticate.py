"""Who asks: from the headers of a request to a tenant.

`Authenticator` is the seam: API keys stand behind it today; signed tokens and roles will be
further implementations, and nothing that calls it has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from agentmem_cluster.errors import Forbidden, Unauthorized
from agentmem_node.security.keys import DEFAULT_TENANT, KeyOwner, hash_key

_HOW = "Send `Authorization: Bearer <API key>`, `Authorization: Token <API key>` or `X-API-Key`."
_KEY_CHARACTERS_MAX = 512


class Principal(NamedTuple):
    """Who was recognised."""

    tenant: str
    key_id: str
    is_admin: bool = False

    def must_be_admin(self) -> None:
        """Raises Forbidden."""
        if not self.is_admin:
            who = f"The API key {self.key_id!r}" if self.key_id else "A request without an API key"
            raise Forbidden(
                f"{who} may not change or inspect the cluster.",
                hint="Use a key that has `admin = true` under security.api_keys "
                "(`agentmem key new --admin` makes one).",
            )


ANONYMOUS = Principal(DEFAULT_TENANT, "")


class Authenticator(Protocol):
    def authenticate(self, authorization: str | None, api_key: str | None) -> Principal:
        """The caller, from the headers Authorization and X-API-Key. Raises Unauthorized."""
        ...


class KeyAuthenticator:
    """API keys. Without `required`, a request that shows no key is the default tenant's.

    While there is no key at all, such a request may also administer: the node listens on
    loopback only.
    """

    def __init__(
        self,
        find: Callable[[bytes], KeyOwner | None],
        required: Callable[[], bool],
        exist: Callable[[], bool],
    ) -> None:
        self._find = find
        self._required = required
        self._exist = exist

    def authenticate(self, authorization: str | None, api_key: str | None) -> Principal:
        if authorization is None and api_key is None:
            if self._required():
                raise Unauthorized("This node needs an API key.", hint=_HOW)
            return ANONYMOUS._replace(is_admin=not self._exist())
        key = _key_of(authorization, api_key)
        found = self._find(hash_key(key))
        if found is None:
            # A wrong key is refused even where none is needed: silently becoming another
            # tenant would store memories where their owner never finds them.
            raise Unauthorized(
                "The API key is unknown.",
                hint=_HOW
                if self._required()
                else "This node needs none: leave it out, or use a key from its configuration.",
            )
        return Principal(found.tenant, found.key_id, found.is_admin)


def _key_of(authorization: str | None, api_key: str | None) -> str:
    keys = set()
    if api_key is not None:
        keys.add(api_key.strip())
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() not in ("bearer", "token") or not key.strip():
            raise Unauthorized("The Authorization header is not understood.", hint=_HOW)
        keys.add(key.strip())
    if len(keys) > 1:
        raise Unauthorized("Authorization and X-API-Key show different keys.", hint=_HOW)
    key = keys.pop()
    if not key or len(key) > _KEY_CHARACTERS_MAX:
        raise Unauthorized("The API key is empty or too long.", hint=_HOW)
    return key
