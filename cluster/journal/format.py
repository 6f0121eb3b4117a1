"""The bytes of the journal.

A journal is a row of segment files; a segment is a row of blocks; a block is what one flush wrote.

    block  = header | table of rows | contents of the rows, in order
    header = magic, segment number, format version, flags, rows, sequence, synced sequence,
             bytes of contents, checksum of the previous block's header, checksum
    row    = kind, group, term, index, count, bytes of its content, checksum of its content

The header's checksum covers the header and the table, each row's its content, so a block is
either whole or known to be damaged. Three fields say *what a damaged block means*:

- The sequence number counts blocks without a gap, across segments.
- `synced` is the last sequence that was known to be on stable storage when the block was
  written. A damaged block at or below any `synced` that is found anywhere had been synced, so
  its entries may have been acknowledged; one above all of them is a torn write and goes.
- The segment number tells blocks from what a recycled file held before.

The layout of the header is the same in every version to come, so that an older program can
name what it refuses.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple
from zlib import crc32

from agentmem_cluster.errors import AgentMemError

MAGIC: Final = b"\xaaJ\x1d\xf7"
VERSION: Final = 1
FLAG_SNAPSHOT: Final = 1  # the rows are the state of every group: the first block of a segment

HEADER_BODY: Final = struct.Struct("<4sQHHIQQQI")
CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = HEADER_BODY.size + CRC.size
ROW: Final = struct.Struct("<BxxxIQQIII")
STATE: Final = struct.Struct("<QQQQQQHB")
MARK: Final = struct.Struct("<4sIQ")
MARK_BYTES: Final = MARK.size + CRC.size

ROWS_MAX: Final = 1 << 20
VOTE_BYTES_MAX: Final = 255

# Kinds of rows.
APPEND: Final = 1  # entries index.. of one term; content: count lengths, then the commands
TRUNCATE: Final = 2  # entries index.. are dropped
HARD_STATE: Final = 3  # term; content: the vote, count 0 when there is none
COMPACT: Final = 4  # entries ..index are no longer needed; term is the one of entry index
STATE_OF: Final = 5  # content: everything about a group but its entries
DROP: Final = 6  # the group is gone
RELOCATE: Final = 7  # like APPEND, of entries that stand in an older segment too


class JournalCorrupt(AgentMemError):
    """What was synced, and may have been acknowledged, cannot be read. The node must not start."""

    code = "journal_corrupt"

    def __init__(self, file: str, offset: int, reason: str) -> None:
        super().__init__(
            f"The journal is damaged: {file}, byte {offset}: {reason}. Entries in it may have "
            "been acknowledged, so this node refuses to go on without them.",
            hint="Keep a copy of the node's data directory and check its disk. The other replicas "
            "hold the same entries: the cluster serves without this node while a majority is up. "
            "Restore this node's data directory from an intact copy, or replace the node; never "
            "delete journal files and start it.",
            file=file,
            offset=offset,
        )
        self.file = file
        self.offset = offset


class GroupState(NamedTuple):
    """All of a group but its entries."""

    id: str
    epoch: int
    first_index: int = 1
    base_term: int = 0
    last_index: int = 0
    last_term: int = 0
    term: int = 0
    vote: str | None = None

    def encode(self) -> bytes:
        name = self.id.encode()
        vote = b"" if self.vote is None else self.vote.encode()
        fixed = STATE.pack(
            self.epoch,
            self.first_index,
            self.base_term,
            self.last_index,
            self.last_term,
            self.term,
            len(name),
            self.vote is not None,
        )
        return fixed + name + vote

    @classmethod
    def decode(cls, content: bytes) -> GroupState:
        """Raises ValueError, struct.error included in it, when it is none."""
        if len(content) < STATE.size:
            raise ValueError("the state of a group is cut short")
        epoch, first, base, last, last_term, term, name_bytes, voted = STATE.unpack_from(content)
        name = content[STATE.size : STATE.size + name_bytes].decode()
        vote = content[STATE.size + name_bytes :].decode() if voted else None
        return cls(name, epoch, first, base, last, last_term, term, vote)


class Header(NamedTuple):
    segment: int
    flags: int
    rows: int
    sequence: int
    synced: int
    content_bytes: int
    previous_crc: int
    crc: int

    @property
    def block_bytes(self) -> int:
        return HEADER_BYTES + self.rows * ROW.size + self.content_bytes


def encode_block(
    segment: int,
    sequence: int,
    synced: int,
    previous_crc: int,
    rows: list[bytes],
    contents: list[bytes],
    flags: int = 0,
) -> tuple[bytes, int]:
    """The bytes of a block and the checksum of its header, which the next block repeats."""
    body = HEADER_BODY.pack(
        MAGIC,
        segment,
        VERSION,
        flags,
        len(rows),
        sequence,
        synced,
        sum(map(len, contents)),
        previous_crc,
    )
    table = b"".join(rows)
    crc = crc32(table, crc32(body))
    return b"".join((body, CRC.pack(crc), table, *contents)), crc


def encode_row(kind: int, group: int, term: int, index: int, count: int, content: bytes) -> bytes:
    return ROW.pack(kind, group, term, index, count, len(content), crc32(content))


def encode_commands(commands: list[bytes]) -> bytes:
    return b"".join((struct.pack(f"<{len(commands)}I", *map(len, commands)), *commands))


def decode_commands(content: bytes, count: int) -> list[bytes]:
    """Raises ValueError when the lengths do not add up to the content."""
    at = 4 * count
    if len(content) < at:
        raise ValueError("the lengths of the commands are cut short")
    commands = []
    for size in struct.unpack_from(f"<{count}I", content):
        commands.append(content[at : at + size])
        at += size
    if at != len(content):
        raise ValueError("the commands are not as long as their lengths say")
    return commands


def read_header(view: memoryview, at: int, segment: int) -> Header | None:
    """The header at `view[at:]` when it and its table are whole and of this segment.

    Raises UnsupportedVersion when it is whole and of another format version.
    """
    if len(view) - at < HEADER_BYTES:
        return None
    magic, of_segment, version, flags, rows, sequence, synced, size, previous = (
        HEADER_BODY.unpack_from(view, at)
    )
    if magic != MAGIC or of_segment != segment or rows > ROWS_MAX:
        return None
    (crc,) = CRC.unpack_from(view, at + HEADER_BODY.size)
    table_at = at + HEADER_BYTES
    table_end = table_at + rows * ROW.size
    if (
        table_end + size > len(view)
        or crc32(view[table_at:table_end], crc32(view[at : at + HEADER_BODY.size])) != crc
    ):
        return None
    if version != VERSION:
        raise UnsupportedVersion(version)
    return Header(segment, flags, rows, sequence, synced, size, previous, crc)


class UnsupportedVersion(Exception):
    """A whole block of a format that this program does not know."""


def encode_mark(sequence: int) -> bytes:
    body = MARK.pack(MAGIC, VERSION, sequence)
    return body + CRC.pack(crc32(body))


def decode_mark(data: bytes) -> int:
    """The sequence in a mark; 0 when it is torn, because then it is no evidence of anything."""
    if len(data) < MARK_BYTES:
        return 0
    magic, _, sequence = MARK.unpack_from(data)
    (crc,) = CRC.unpack_from(data, MARK.size)
    whole = magic == MAGIC and crc == crc32(data[: MARK.size])
    return int(sequence) if whole else 0
