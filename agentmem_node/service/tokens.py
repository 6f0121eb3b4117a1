"""Consistency tokens: `s03:118,s07:42` says "shard s03 as of entry 118 and s07 as of entry 42".

A write answers with the token of what it wrote; a read with `consistency=session` and that
token waits, on any replica, until it has applied as much: read-your-writes anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from agentmem_cluster.errors import InvalidField

_PART = re.compile(r"(s[0-9]{2,5}):([0-9]{1,18})")
_TOKEN_CHARS_MAX = 16_384


def encode_token(applied: Mapping[str, int]) -> str:
    return ",".join(f"{shard}:{index}" for shard, index in sorted(applied.items()))


def decode_token(text: str) -> dict[str, int]:
    """Shard -> applied index. Raises InvalidField when the text was not made by `encode_token`."""
    applied: dict[str, int] = {}
    if len(text) <= _TOKEN_CHARS_MAX:
        for part in filter(None, text.split(",")):
            match = _PART.fullmatch(part)
            if match is None:
                break
            applied[match[1]] = int(match[2])
        else:
            return applied
    raise InvalidField(
        "The consistency token cannot be read.",
        hint="Send back the `token` of an earlier answer, unchanged.",
        field="token",
    )


def merge_tokens(parts: Mapping[str, int], into: dict[str, int]) -> None:
    """Keep the later index of each shard."""
    for shard, index in parts.items():
        into[shard] = max(index, into.get(shard, 0))
