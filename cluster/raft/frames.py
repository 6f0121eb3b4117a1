"""What Raft members say to each other: flat msgpack lists, checked by shape before they are used.

A frame is `[kind, group, epoch, boot, term, ...]`: the epoch keeps a group's earlier lives out,
the boot tells one life of the sender's process from the next, and the term is the sender's. An
answer also carries the boot of the asker, so that nothing asked before a restart is taken for
an answer after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

from agentmem_cluster.raft.api import Entry

BOOT_BYTES = 8
# A read that the leader cannot serve now: it lost its role, or has committed nothing yet.
NO_INDEX = -1
# The journal keeps terms and indexes in 64 bits. What is near that limit is nobody's honest
# count, and one more election or entry would overflow it on every member that believed it.
NUMBER_MAX = 1 << 62


class Kind(IntEnum):
    APPEND = 1  # previous index, previous term, commit, floor, terms, commands
    APPENDED = 2  # to boot, matched index
    REFUSED = 3  # to boot, previous index refused, next index to try
    ASK_VOTE = 4  # last index, last term, by hand-over
    VOTE = 5  # to boot
    TAKE_OVER = 6  #
    ASK_PREVOTE = 7  # round, last index, last term
    PREVOTE = 8  # to boot, round, granted
    PROBE = 9  # round
    PROBED = 10  # to boot, round
    ASK_READ = 11  # number
    READ_AT = 12  # to boot, number, index
    TERM_IS_OLD = 13  #
    RESEED = 14  # first index kept


_INT = int
_SHAPES: dict[int, tuple[type, ...]] = {
    Kind.APPEND: (_INT, _INT, _INT, _INT, list, list),
    Kind.APPENDED: (bytes, _INT),
    Kind.REFUSED: (bytes, _INT, _INT),
    Kind.ASK_VOTE: (_INT, _INT, bool),
    Kind.VOTE: (bytes,),
    Kind.TAKE_OVER: (),
    Kind.ASK_PREVOTE: (_INT, _INT, _INT),
    Kind.PREVOTE: (bytes, _INT, bool),
    Kind.PROBE: (_INT,),
    Kind.PROBED: (bytes, _INT),
    Kind.ASK_READ: (_INT,),
    Kind.READ_AT: (bytes, _INT, _INT),
    Kind.TERM_IS_OLD: (),
    Kind.RESEED: (_INT,),
}
# Kinds whose first field is the boot of the node that asked.
ANSWERS = frozenset(kind for kind, shape in _SHAPES.items() if shape and shape[0] is bytes)
HEAD = 5
_HEAD_SHAPE: tuple[type, ...] = (int, str, int, bytes, int)
# What a whole frame of each kind consists of, and where its numbers stand.
_TYPES = {int(kind): (*_HEAD_SHAPE, *shape) for kind, shape in _SHAPES.items()}
_NUMBERS = {
    int(kind): tuple(at for at, field in enumerate(shape, HEAD) if field is int)
    for kind, shape in _SHAPES.items()
}


def well_formed(frame: Any) -> bool:
    """Whether a decoded value has the shape of a frame. Peers are authenticated, not infallible."""
    if type(frame) is not list or not frame or type(frame[0]) is not int:
        return False
    kind = frame[0]
    if tuple(map(type, frame)) != _TYPES.get(kind) or not 0 <= frame[4] < NUMBER_MAX:
        return False
    for at in _NUMBERS[kind]:
        if not NO_INDEX <= frame[at] < NUMBER_MAX:
            return False
    return kind != Kind.APPEND or _is_append(frame)


def _is_append(frame: list[Any]) -> bool:
    previous, previous_term, commit, floor, terms, commands = frame[HEAD:]
    if previous < 0 or previous_term < 0 or commit < 0 or floor < 0:
        return False
    if not commands:
        return not terms
    # Runs of equal terms: [[term, entries], ...], rising.
    counted, before = 0, previous_term
    for run in terms:
        if type(run) is not list or len(run) != 2 or type(run[0]) is not int:
            return False
        if type(run[1]) is not int or run[1] < 1 or run[0] < before:
            return False
        counted, before = counted + run[1], run[0]
    if counted != len(commands) or before > frame[4]:
        return False
    return all(type(command) is bytes for command in commands)


def pack_terms(entries: Sequence[Entry]) -> list[list[int]]:
    """The terms of consecutive entries as runs `[term, count]`: nearly always a single one."""
    if not entries:
        return []
    if entries[0].term == entries[-1].term:  # terms never fall along a log
        return [[entries[0].term, len(entries)]]
    runs: list[list[int]] = []
    for entry in entries:
        if runs and runs[-1][0] == entry.term:
            runs[-1][1] += 1
        else:
            runs.append([entry.term, 1])
    return runs


def unpack_entries(previous: int, terms: list[list[int]], commands: list[bytes]) -> list[Entry]:
    """The inverse: entries from `previous + 1` on."""
    entries: list[Entry] = []
    index = previous
    at = 0
    for term, count in terms:
        for command in commands[at : at + count]:
            index += 1
            entries.append(Entry(index, term, command))
        at += count
    return entries


def bursts(frames: list[list[Any]], bytes_max: int) -> Iterator[list[list[Any]]]:
    """The frames in order, cut so that no part carries much more than `bytes_max` of commands."""
    size = begin = 0
    for at, frame in enumerate(frames):
        if frame[0] == Kind.APPEND and frame[-1]:
            size += sum(map(len, frame[-1]))
            if size > bytes_max and at > begin:
                yield frames[begin:at]
                begin, size = at, sum(map(len, frame[-1]))
    yield frames[begin:] if begin else frames
