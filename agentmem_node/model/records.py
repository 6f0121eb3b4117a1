"""Stored memories: what a read of the store answers, and how a record's JSON is read back."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from agentmem_node.model.memory import Memory

# A record's own nesting is bounded by the service (`limits.metadata_depth_max`, 64 at most).
# Deeper JSON is refused by counting, because the parser's own bound is the depth of the Python
# stack it is called on: replicas could disagree about the same bytes.
_DEPTH_MAX: Final = 128

_decoder = msgspec.json.Decoder(Memory)


class Stored(NamedTuple):
    """One live memory as it is kept. `record` is ready JSON, to be spliced into an answer."""

    id: bytes
    record: bytes
    version: int
    created_ms: int
    updated_ms: int
    expires_ms: int | None

    def is_expired(self, now_ms: int) -> bool:
        return self.expires_ms is not None and self.expires_ms <= now_ms


class Page(NamedTuple):
    """Part of a list, newest first. `after` continues it; None when there is no more."""

    items: list[Stored]
    after: tuple[int, bytes] | None


def decode_memory(record: bytes) -> Memory | None:
    """The memory in a record, or None when the bytes are none. Never raises."""
    if record.count(b"[") + record.count(b"{") > _DEPTH_MAX and _depth(record) > _DEPTH_MAX:
        return None
    try:
        return _decoder.decode(record)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _depth(record: bytes) -> int:
    deepest = depth = 0
    in_text = escaped = False
    for byte in record:
        if in_text:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quote
                in_text = False
        elif byte == 0x22:
            in_text = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest
