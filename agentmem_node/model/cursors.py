"""Cursors: where a page ended, as an opaque text that fits only the request it came from.

    base64url( version 1 byte | 8 bytes fingerprint of the request | score, float64 | id, 16 bytes )

A cursor is a position in an order, not a count: memories added or deleted meanwhile neither
repeat nor hide the others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import struct
from typing import Final

from agentmem_cluster.errors import InvalidCursor

_VERSION: Final = 1
_LAYOUT: Final = struct.Struct(">B8sd16s")

Position = tuple[float, bytes]
"""(score, id) of the last result seen; a list orders by time, so its score is milliseconds."""


def fingerprint(*parts: bytes) -> bytes:
    """8 bytes that tell requests apart: whatever decides their order, page size left out."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def encode_cursor(position: Position, request: bytes) -> str:
    """The text of a position; `request` is the `fingerprint` of what was asked."""
    score, memory_id = position
    packed = _LAYOUT.pack(_VERSION, request, score, memory_id)
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def decode_cursor(text: str, request: bytes) -> Position:
    """The position in `text`. Raises InvalidCursor, also for another request's cursor."""
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version, made_for, score, memory_id = _LAYOUT.unpack(packed)
    except (binascii.Error, struct.error, ValueError):
        raise _invalid("is damaged") from None
    if version != _VERSION or not math.isfinite(score):
        raise _invalid("is damaged")
    if made_for != request:
        raise _invalid("belongs to another request")
    return score, memory_id


def _invalid(why: str) -> InvalidCursor:
    return InvalidCursor(
        f"`cursor` {why}.",
        hint="Send the cursor of the last answer with an otherwise unchanged request, "
        "or start again without one.",
    )
