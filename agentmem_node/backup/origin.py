"""Where a shard's log goes on after the shard was taken back: an entry of that log says it.

It stands before the one that begins the epoch which a rewind founds. No state machine knows it: to
all of them, of every version, it is an entry that does nothing. It is for who reads the archived
log.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgpack

from agentmem_cluster.epochs.commands import FORMAT, MARK, Begin, is_control
from agentmem_cluster.epochs.commands import decode as decode_control
from agentmem_cluster.raft.api import Entry
from agentmem_node.storage.layout import DIGEST_BYTES

_REWOUND: Final = 3  # beside the kinds of `agentmem_cluster.epochs.commands`


class Origin(NamedTuple):
    """Epoch `epoch` of a shard began, at `at_ms` on its leader's clock, with what the shard was in
    a backup (`until_ms` None) or at a moment after it, by its log up to entry `upto`. `digest`: the
    rolling one that it had there, or empty when who wrote this had been started again since."""

    epoch: int
    backup: str
    until_ms: int | None
    upto: int | None
    at_ms: int
    digest: bytes


def encode(origin: Origin) -> bytes:
    body: bytes = msgpack.packb([FORMAT, _REWOUND, *origin])
    return MARK + body


def decode(command: bytes) -> Origin | None:
    """None for every other command. Never raises."""
    if not is_control(command):
        return None
    try:
        value: Any = msgpack.unpackb(command[1:])
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    if type(value) is not list or len(value) != 8 or value[:2] != [FORMAT, _REWOUND]:
        return None
    found = Origin(*value[2:])
    is_one = (
        type(found.epoch) is int
        and type(found.backup) is str
        and (found.until_ms is None or type(found.until_ms) is int)
        and (found.upto is None or type(found.upto) is int)
        and type(found.at_ms) is int
        and type(found.digest) is bytes
        and len(found.digest) in (0, DIGEST_BYTES)
    )
    return found if is_one else None


def origin_in(entries: Iterable[Entry], epoch: int) -> Origin | None:
    """What the entries of an epoch, from its first one on, say of where it began."""
    for entry in entries:
        found = decode(entry.command)
        if found is not None and found.epoch == epoch:
            return found
        if isinstance(decode_control(entry.command), Begin):
            return None  # it would stand before this
    return None
