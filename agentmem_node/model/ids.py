"""Memory ids: UUIDs of version 8 (RFC 9562) that say when, and on which slot, a memory was added.

    bits   0-47   milliseconds since 1970, so that keys written together lie together on disk
    bits  48-51   version, 8
    bits  52-63   high 12 bits of the slot
    bits  64-65   variant, binary 10
    bits  66-67   low 2 bits of the slot
    bits 68-127   60 random bits

Any node finds the shard of a memory from its id alone. Within the program an id is 16 bytes.
"""

from __future__ import annotations

import re

from agentmem_cluster.errors import InvalidField
from agentmem_cluster.runtime import Rng

SLOTS = 1 << 14
ID_BYTES = 16

_TIME_MS_END = 1 << 48
_RANDOM_MASK = (1 << 60) - 1
# What Python's uuid.UUID reads too, without its leniency about where the dashes stand.
_TEXT = re.compile(
    r"(?:urn:uuid:)?(\{)?"
    r"([0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?(1)\})",
    re.IGNORECASE,
)


def new_id(now_ms: int, slot: int, rng: Rng) -> bytes:
    """A fresh id of 16 bytes; ids of later milliseconds sort after it."""
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot {slot} is not within 0..{SLOTS - 1}")
    time_ms = min(max(now_ms, 0), _TIME_MS_END - 1)
    random = int.from_bytes(rng.token(8), "big") & _RANDOM_MASK
    value = (
        (time_ms << 80)
        | (0x8 << 76)
        | ((slot >> 2) << 64)
        | (0b10 << 62)
        | ((slot & 0b11) << 60)
        | random
    )
    return value.to_bytes(16, "big")


def slot_of_id(key: bytes) -> int:
    """The slot within an id. A UUID that is not ours has some slot, on which nothing is found."""
    return ((key[6] & 0x0F) << 10) | (key[7] << 2) | ((key[8] >> 4) & 0b11)


def time_of_id(key: bytes) -> int:
    """Milliseconds since 1970 at which the id was drawn."""
    return int.from_bytes(key[:6], "big")


def format_id(key: bytes) -> str:
    """The canonical text: 36 lower-case characters."""
    h = key.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def parse_id(text: str, field: str = "id") -> bytes:
    """16 bytes of any UUID text (upper case, braces, `urn:uuid:` and no dashes included).

    Raises InvalidField.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        shown = text if len(text) <= 64 else text[:61] + "..."
        raise InvalidField(
            f"`{field}` is not a memory id: {shown!r}.",
            hint="A memory id is a UUID, such as 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7.",
            field=field,
        )
    return bytes.fromhex(match[2].replace("-", ""))
