"""Cursors: where a page ended, as an opaque text that fits only the request it came from.

    base64url( version, kind: 1 byte each | search: fingerprint of the request, 8 bytes
               | search: score, float64; list: created, int64 | id, 16 bytes )

A cursor is a position in an order, not a count: memories added or deleted meanwhile neither
repeat nor hide the others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import struct
from typing import Any, Final

from agentmem_cluster.errors import InvalidCursor

_VERSION: Final = 1
_SEARCH: Final = struct.Struct(">BB8sd16s")
_LIST: Final = struct.Struct(">BBq16s")
_KIND_SEARCH: Final = 1
_KIND_LIST: Final = 2


def fingerprint(*parts: bytes) -> bytes:
    """8 bytes that tell requests apart: of whatever decides their order, the page size left out."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def encode_search_cursor(after: tuple[float, bytes], request: bytes) -> str:
    """The text of (score, id); `request` is the `fingerprint` of what was asked."""
    score, memory_id = after
    return _text(_SEARCH.pack(_VERSION, _KIND_SEARCH, request, score, memory_id))


def decode_search_cursor(text: str, request: bytes) -> tuple[float, bytes]:
    """(score, id). Raises InvalidCursor, also when the cursor was made for another request."""
    made_for, score, memory_id = _fields(text, _SEARCH, _KIND_SEARCH)
    if not math.isfinite(score):
        raise _invalid("is damaged")
    if made_for != request:
        raise _invalid("belongs to another request")
    return score, memory_id


def encode_list_cursor(after: tuple[int, bytes]) -> str:
    """The text of (created_ms, id)."""
    return _text(_LIST.pack(_VERSION, _KIND_LIST, *after))


def decode_list_cursor(text: str) -> tuple[int, bytes]:
    """(created_ms, id). Raises InvalidCursor."""
    created_ms, memory_id = _fields(text, _LIST, _KIND_LIST)
    return created_ms, memory_id


def _text(packed: bytes) -> str:
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def _fields(text: str, layout: struct.Struct, kind: int) -> tuple[Any, ...]:
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        version, found, *fields = layout.unpack(packed)
    except (binascii.Error, struct.error, ValueError):
        raise _invalid("is damaged, or was made by another kind of request") from None
    if version != _VERSION or found != kind:
        raise _invalid("is damaged, or was made by another kind of request")
    return tuple(fields)


def _invalid(why: str) -> InvalidCursor:
    return InvalidCursor(
        f"`cursor` {why}.",
        hint="Send the cursor of the last answer with an otherwise unchanged request, "
        "or start again without one.",
    )
