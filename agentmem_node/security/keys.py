"""API keys: how they are made, kept and found.

A key is 32 random bytes, so its plain SHA-256 cannot be guessed back and is all that is kept: a
stolen configuration opens nothing. Slow password hashes protect weak secrets; these are not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentmem_cluster.runtime import Rng
from agentmem_node.config_keys import ApiKey, ConfigError

PREFIX = "am_"
DEFAULT_TENANT = "default"
_KEY_BYTES = 32
# Shorter secrets given through key_env could be guessed; ours have 55 characters.
_SECRET_CHARACTERS_MIN = 16
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})?")


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """Whose key it is. `key_id` names the key in logs without giving it away.

    `is_admin`: its holder may change the cluster. That is no right to other tenants' memories.
    """

    tenant: str
    key_id: str
    is_admin: bool = False


def new_key(rng: Rng) -> str:
    """A fresh API key, `am_` and 52 characters. Show it once; keep `hash_key` of it."""
    secret = base64.b32encode(rng.token(_KEY_BYTES)).decode().rstrip("=").lower()
    return PREFIX + secret


def hash_key(key: str) -> bytes:
    """The 32 bytes by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_tenant(tenant: str) -> str:
    """`tenant` itself. Raises ConfigError unless it is `organisation` or `organisation/project`."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(
            f"{tenant!r} is not a tenant: `organisation` or `organisation/project`, each up to "
            "64 letters, digits, dots, dashes or underscores, beginning with a letter or digit."
        )
    return tenant


class KeyTable:
    """The keys of the configuration, by hash."""

    def __init__(self, owners: Mapping[bytes, KeyOwner]) -> None:
        self._owners = dict(owners)

    def __len__(self) -> int:
        return len(self._owners)

    @classmethod
    def from_config(
        cls, entries: Sequence[ApiKey], environment: Mapping[str, str] | None = None
    ) -> KeyTable:
        """Raises ConfigError when a named variable is empty, or a key is listed twice."""
        environment = os.environ if environment is None else environment
        owners: dict[bytes, KeyOwner] = {}
        for number, entry in enumerate(entries):
            where = f"security.api_keys[{number}]"
            if entry.key_hash is not None:
                digest = bytes.fromhex(entry.key_hash)
            else:
                name = entry.key_env or ""
                secret = environment.get(name, "")
                if len(secret) < _SECRET_CHARACTERS_MIN:
                    raise ConfigError(
                        f"{where}: the variable {name} holds no API key of at least "
                        f"{_SECRET_CHARACTERS_MIN} characters. Make one with `agentmem key new`."
                    )
                digest = hash_key(secret)
            if digest in owners:
                raise ConfigError(f"{where} is the same key as an entry before it.")
            key_id = entry.id or digest.hex()[:8]
            owners[digest] = KeyOwner(check_tenant(entry.tenant), key_id, entry.admin)
        return cls(owners)

    def find(self, digest: bytes) -> KeyOwner | None:
        """The owner of the key with this hash, or None; takes as long whichever key it is.

        A dict compares hashes by value, which tells an attacker nothing: choosing a key does
        not choose its SHA-256. The last comparison is in constant time all the same.
        """
        owner = self._owners.get(digest)
        known = digest if owner is not None else bytes(32)
        return owner if hmac.compare_digest(known, digest) else None
