"""The archived log: every committed entry of every shard, for the moments between two backups.

    log/<cluster id>/<shard>/e<epoch>/<first index>-<last index>

A segment is one object, written once: a head with its bounds and times, then the entries,
compressed, then the checksum of both. Two nodes that lead a shard one after the other may write
segments that overlap; the entries in them are the same, because they are committed.

Times: a command carries the time at which it was decided (`at_ms`) on some node's clock. What
counts is the running maximum, which never goes back; the shard's own ledger keeps the same one.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgpack
import msgspec

from agentmem_cluster.epochs.commands import Seal
from agentmem_cluster.epochs.commands import decode as decode_control
from agentmem_cluster.raft.api import Entry
from agentmem_node.backup.errors import (
    BackupDamaged,
    BackupMissing,
    RestoreImpossible,
    damaged,
)
from agentmem_node.backup.objects import ObjectStore
from agentmem_node.backup.origin import Origin, origin_in
from agentmem_node.model.commands import Write, decode

PREFIX: Final = "log/"
REACHED_PREFIX: Final = "archived/"
_NAME: Final = re.compile(
    r"log/([A-Za-z0-9][A-Za-z0-9._-]*)/(s[0-9]{2,5})/e([0-9]{10})/([0-9]{20})-([0-9]{20})"
)
_MAGIC: Final = b"AML1"
_SUM_BYTES: Final = 32
_LEVEL: Final = 1
# More than a leader ever has under way.
_UNDER_WAY_MAX: Final = 20_000
# A segment holds what a read of the journal gave: a few MiB. The bound is for damaged ones.
_PLAIN_BYTES_MAX: Final = 256 << 20


class Segment(NamedTuple):
    """What a segment's name says."""

    cluster_id: str
    shard: str
    epoch: int
    first: int
    last: int

    @property
    def name(self) -> str:
        where = f"{PREFIX}{self.cluster_id}/{self.shard}/e{self.epoch:010d}"
        return f"{where}/{self.first:020d}-{self.last:020d}"

    @classmethod
    def of_name(cls, name: str) -> Segment | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        found = cls(match[1], match[2], int(match[3]), int(match[4]), int(match[5]))
        return found if 0 < found.first <= found.last else None


class Contents(NamedTuple):
    """What a segment holds. `slots`: [first, end) of its shard in its epoch."""

    entries: list[Entry]
    slots: tuple[int, int]


class Part(NamedTuple):
    """A shard from one of its epochs on, with slots [first, end): as a split made it, as it was
    backed up, or as it was taken back to (`origin`). `base`: the entry before its first one."""

    shard: str
    slots: tuple[int, int]
    epoch: int
    base: int
    origin: Origin | None = None


# What a shard was of, the whole first: its state is that of the whole up to the base of the next.
Lineage = tuple[Part, ...]


class Reached(msgspec.Struct, frozen=True):
    """At `at_ms` on its leader's clock, a shard's log was archived up to entry `last`."""

    epoch: int
    last: int
    at_ms: int


class Gap(NamedTuple):
    """Entries `first` to `last` are in no segment: no moment within them can be restored."""

    first: int
    last: int


def pack(segment: Segment, entries: Sequence[Entry], slots: tuple[int, int]) -> bytes:
    """The object of a segment. Raises ValueError when the entries are not those of its name."""
    expected = range(segment.first, segment.last + 1)
    if [entry.index for entry in entries] != list(expected):
        raise ValueError(f"{segment.name} is to hold other entries than it was given")
    rows = [(entry.term, entry.command) for entry in entries]
    body: bytes = zlib.compress(msgpack.packb(rows), _LEVEL)
    head: bytes = msgpack.packb([*segment, *slots])
    data = _MAGIC + len(head).to_bytes(2, "big") + head + body
    return data + hashlib.blake2b(data, digest_size=_SUM_BYTES).digest()


def unpack(segment: Segment, raw: bytes) -> Contents:
    """Raises BackupDamaged."""
    name = segment.name
    data, checksum = raw[:-_SUM_BYTES], raw[-_SUM_BYTES:]
    if hashlib.blake2b(data, digest_size=_SUM_BYTES).digest() != checksum:
        raise damaged(name, "its checksum is wrong")
    if data[: len(_MAGIC)] != _MAGIC:
        raise damaged(name, "it is no part of an archived log that this version knows")
    at = len(_MAGIC) + 2
    end = at + int.from_bytes(data[len(_MAGIC) : at], "big")
    try:
        head: Any = msgpack.unpackb(data[at:end])
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(data[end:], _PLAIN_BYTES_MAX)
        rows: Any = msgpack.unpackb(plain)
        if head[:-2] != list(segment) or not unpacker.eof:
            raise ValueError("it is another segment than its name says")
        entries = [
            Entry(segment.first + number, int(term), bytes(command))
            for number, (term, command) in enumerate(rows)
        ]
        slots = (int(head[-2]), int(head[-1]))
    except (ValueError, TypeError, zlib.error, msgpack.UnpackException) as error:
        raise damaged(name, str(error)) from error
    if len(entries) != segment.last - segment.first + 1:
        raise damaged(name, "entries are missing in it")
    return Contents(entries, slots)


def at_ms_of(command: bytes) -> int | None:
    """The time that a command names; None for what is no write."""
    write = decode(command)
    return write.at_ms if isinstance(write, Write) else None


class Archive:
    """The archived log of one cluster in one store."""

    def __init__(
        self, store: ObjectStore, cluster_id: str, before: Mapping[str, int] | None = None
    ) -> None:
        """`before`: of these shards only epochs before that one count."""
        self._store = store
        self.cluster_id = cluster_id
        self._before = dict(before or {})

    def before(self, shard: str, epoch: int) -> Archive:
        """The same, as it was before an epoch of a shard."""
        return Archive(self._store, self.cluster_id, {**self._before, shard: epoch})

    def append(
        self, shard: str, epoch: int, entries: Sequence[Entry], slots: tuple[int, int]
    ) -> Segment:
        """Write entries as one segment, which is durable on return. `slots`: the shard's."""
        segment = Segment(self.cluster_id, shard, epoch, entries[0].index, entries[-1].index)
        self._store.put_if_absent(segment.name, pack(segment, entries, slots))
        return segment

    def segments(self, shard: str, epoch: int | None = None, after: str = "") -> list[Segment]:
        """In the order of epochs, then of entries; those whose name sorts after `after`."""
        prefix = f"{PREFIX}{self.cluster_id}/{shard}/"
        if epoch is not None:
            prefix += f"e{epoch:010d}/"
        found = (Segment.of_name(item.name) for item in self._store.list(prefix, after))
        end = self._before.get(shard)
        return [s for s in found if s is not None and (end is None or s.epoch < end)]

    def read(self, segment: Segment) -> Contents:
        """Raises BackupMissing, BackupDamaged."""
        return unpack(segment, self._store.get(segment.name))

    def mark(self, shard: str, reached: Reached) -> None:
        """Say how far the archive of a shard is: an idle shard writes no segments."""
        self._store.put(self._mark(shard), msgspec.json.encode(reached))

    def reached(self, shard: str) -> Reached | None:
        """None when nothing of the shard was ever archived. Raises BackupDamaged."""
        name = self._mark(shard)
        try:
            return msgspec.json.decode(self._store.get(name), type=Reached)
        except BackupMissing:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise damaged(name, str(error)) from error

    def _mark(self, shard: str) -> str:
        return f"{REACHED_PREFIX}{self.cluster_id}/{shard}.json"

    def gaps(self, shard: str, after: int = 0) -> list[Gap]:
        """What is missing between entry `after` and the end, over all epochs."""
        return gaps(self.segments(shard), after)

    def lineages(self, whole: Part, until_ms: int) -> list[Lineage]:
        """What has become of a shard by `until_ms`: itself alone, or the parts that it was split
        into, and those of the parts. Raises RestoreImpossible when one of them was not archived."""
        return list(self._lineages((whole,), until_ms))

    def _lineages(self, lineage: Lineage, until_ms: int) -> Iterator[Lineage]:
        rewound = self._rewound(lineage[-1], until_ms)
        if rewound is not None:
            lineage = (rewound,)  # nothing of what was before is in it
        parts = self._split_of(lineage[-1], until_ms)
        if not parts:
            yield lineage
        for part in parts:
            yield from self._lineages((*lineage, part), until_ms)

    def rewinds(self, shard: str, after: int, *, legible: bool = False) -> Iterator[Part]:
        """What a shard began with each time that it was taken back, in epochs after `after`.

        Raises BackupMissing, BackupDamaged; or leaves out, with `legible`, the epochs whose
        beginning cannot be read: from it on, nothing of them can be restored anyway.
        """
        for first in self._first_of_epochs(shard):
            if first.epoch <= after:
                continue
            try:
                origin = self.origin(shard, first.epoch)
                slots = self.read(first).slots if origin is not None else (0, 0)
            except (BackupMissing, BackupDamaged):
                if not legible:
                    raise
                continue
            if origin is not None:
                yield Part(shard, slots, first.epoch, first.first - 1, origin)

    def origin(self, shard: str, epoch: int) -> Origin | None:
        """Where an epoch began, if not where the one before it ended."""
        segments = self.segments(shard, epoch)
        entries = (entry for segment in segments for entry in self.read(segment).entries)
        return origin_in(entries, epoch)

    def _rewound(self, part: Part, until_ms: int) -> Part | None:
        """What a part was taken back to last, by that moment, before it was split."""
        rewinds = [one for one in self.rewinds(part.shard, part.epoch) if one.slots == part.slots]
        return next((one for one in reversed(rewinds) if not _is_later(one, until_ms)), None)

    def _split_of(self, whole: Part, until_ms: int) -> list[Part]:
        """The parts of a shard, in the order of their slots; none when that moment was before.

        Its own first segment with other slots tells of a split. What else begins at the entry
        after its seal, with some of its slots, is the rest of it.
        """
        own = None
        for segment in self._first_of_epochs(whole.shard):
            if segment.epoch <= whole.epoch:
                continue
            if self.origin(whole.shard, segment.epoch) is not None:
                return []  # it was taken back after that moment, and what came then is later still
            if self.read(segment).slots != whole.slots:
                own = segment
                break
        if own is None:
            return []
        base = own.first - 1
        if self._is_past(whole, base, until_ms):
            return []
        parts = [Part(whole.shard, self.read(own).slots, own.epoch, base)]
        for shard in self._shards():
            first = next(iter(self.segments(shard)), None)
            if first is None or shard == whole.shard or first.first != own.first:
                continue
            slots = self.read(first).slots
            if whole.slots[0] <= slots[0] and slots[1] <= whole.slots[1]:
                parts.append(Part(shard, slots, first.epoch, base))
        parts.sort(key=lambda part: part.slots)
        ends = [whole.slots[0], *(part.slots[1] for part in parts)]
        starts = [*(part.slots[0] for part in parts), whole.slots[1]]
        for end, start in zip(ends, starts, strict=True):
            if end != start:
                raise RestoreImpossible(
                    f"Shard {whole.shard} was split at entry {base}, and the log of the part with "
                    f"slots {end} to {start - 1} was not archived.",
                    hint="Restore a moment before that, or one after a later backup.",
                    shard=whole.shard,
                )
        return parts

    def _is_past(self, whole: Part, base: int, until_ms: int) -> bool:
        """Whether the whole was written after a moment: then no part can count at that moment.

        Nothing that parts lack says so: their logs may have been archived late, or not at all.
        """
        for segment in reversed(self.segments(whole.shard)):
            if segment.epoch < whole.epoch or segment.last <= whole.base:
                break
            if segment.first <= base:
                for entry in self.read(segment).entries:
                    at_ms = at_ms_of(entry.command)
                    if whole.base < entry.index <= base and at_ms is not None and at_ms > until_ms:
                        return True
        return False

    def _first_of_epochs(self, shard: str) -> Iterator[Segment]:
        known = 0
        for segment in self.segments(shard):
            if segment.epoch > known:
                known = segment.epoch
                yield segment

    def _shards(self) -> list[str]:
        prefix = f"{REACHED_PREFIX}{self.cluster_id}/"
        names = [item.name[len(prefix) :] for item in self._store.list(prefix)]
        return sorted(name.removesuffix(".json") for name in names)

    def gaps_of(self, lineage: Lineage, after: int) -> list[Gap]:
        """What is missing of a part behind entry `after`, in the logs that its state comes from."""
        found = []
        ends = [part.base for part in lineage[1:]]
        for part, end in itertools.zip_longest(lineage, ends):
            for segment in self.segments(part.shard):
                if segment.epoch >= part.epoch and (end is None or segment.first <= end):
                    last = segment.last if end is None else min(segment.last, end)
                    found.append(segment._replace(last=last))
        return [
            gap
            for gap in gaps(found, after)
            if not any(self.is_rewind(part.shard, gap) for part in lineage)
        ]

    def is_rewind(self, shard: str, gap: Gap) -> bool:
        """Whether there never were such entries: the epoch before them ended with its seal, and the
        one behind them began further on, because the shard was taken back."""
        if all(part.base != gap.last for part in self.rewinds(shard, 1)):
            return False
        ends = [s for s in self.segments(shard) if s.first < gap.first <= s.last + 1]
        return any(
            isinstance(control, Seal) and control.epoch == segment.epoch
            for segment in ends
            for control in [decode_control(self.read(segment).entries[-1].command)]
        )

    def last_of(self, part: Part) -> int:
        """The last entry that is archived; what the part begins with when there is none."""
        own = (s.last for s in self.segments(part.shard) if s.epoch >= part.epoch)
        return max(own, default=part.base)

    def end_of(self, part: Part) -> int:
        """The last entry that counts of those that are archived now: what its leader had under way
        behind the seal of an epoch was never applied."""
        own = [s for s in self.segments(part.shard) if s.epoch >= part.epoch]
        newest = [segment for segment in own if segment.epoch == own[-1].epoch]
        end = max((segment.last for segment in newest), default=part.base)
        for segment in reversed(newest):
            if segment.last < end - _UNDER_WAY_MAX:
                break
            for entry in self.read(segment).entries:
                if decode_control(entry.command) == Seal(segment.epoch):
                    end = min(end, entry.index)
        return end

    def first_later(self, part: Part, until_ms: int) -> int | None:
        """The first entry of a part's log that names a time after a moment."""
        for segment in self.segments(part.shard):
            if segment.epoch >= part.epoch:
                for entry in self.read(segment).entries:
                    at_ms = at_ms_of(entry.command)
                    if entry.index > part.base and at_ms is not None and at_ms > until_ms:
                        return entry.index
        return None

    def entries(
        self,
        shard: str,
        after: int,
        epoch: int,
        until_ms: int | None,
        slots: tuple[int, int] | None = None,
        upto: int | None = None,
    ) -> Iterator[list[Entry]]:
        """What follows entry `after` of `epoch`, in the history that holds at `until_ms`, and no
        entry behind `upto`.

        Batches end before the first entry that may be too late; the caller keeps the running
        maximum. It ends where the shard has not `slots` any more, because it was split: `lineages`
        says into what. Raises RestoreImpossible at a gap; BackupDamaged, BackupMissing.
        """
        chain = _Chain(self, self.segments(shard), epoch, until_ms, upto)
        expected = after + 1
        reading = epoch
        is_past = False
        sealed = 0  # epochs up to here have ended, whatever their segments still hold
        for segment, end in chain.parts():
            if segment.last < expected or segment.epoch <= sealed:
                continue
            if segment.first > expected:
                raise gap_error(shard, Gap(expected, segment.first - 1))
            batch = []
            contents = self.read(segment)
            if slots is not None and contents.slots != slots:
                if segment.epoch > reading:
                    return
                raise damaged(segment.name, f"it has slots {contents.slots}, not {slots}")
            reading = segment.epoch
            for entry in contents.entries:
                if not expected <= entry.index <= end or (upto is not None and entry.index > upto):
                    continue
                if until_ms is not None:
                    is_past |= (at_ms_of(entry.command) or until_ms) > until_ms
                batch.append(entry)
                expected += 1
                control = decode_control(entry.command)
                if isinstance(control, Seal) and control.epoch == segment.epoch:
                    # What its leader had under way behind the seal never took effect.
                    sealed = segment.epoch
                    break
            if batch:
                yield batch
            if upto is not None and expected > upto:
                return
        if upto is not None and expected <= upto and chain.left_out is None and not is_past:
            raise gap_error(shard, Gap(expected, upto))
        is_cut = chain.left_out is not None and expected < chain.left_out
        if chain.left_out is not None and is_cut and not is_past and sealed < reading:
            # Only its seal, or a later write, shows that nothing of the epoch is missing.
            raise gap_error(shard, Gap(expected, chain.left_out - 1))


def _is_later(rewound: Part, until_ms: int) -> bool:
    assert rewound.origin is not None
    return rewound.origin.at_ms > until_ms


class _Chain:
    """Which segments make one history. An epoch that was founded from an older state than the
    one before it reached (a restore) takes the place of what it did not continue: but only for
    moments after it began, or, where its log does not say when, after its own first write."""

    def __init__(
        self,
        archive: Archive,
        segments: list[Segment],
        epoch: int,
        until_ms: int | None,
        upto: int | None = None,
    ) -> None:
        """`upto`: the last entry that counts. What came behind it says nothing either."""
        self._upto = math.inf if upto is None else upto
        self.left_out: int | None = None  # the first entry of the epochs that begin too late
        self._by_epoch: dict[int, list[Segment]] = {}
        for segment in segments:
            if segment.epoch >= epoch and segment.first <= self._upto:
                self._by_epoch.setdefault(segment.epoch, []).append(segment)
        if until_ms is None:
            return
        for later in sorted(self._by_epoch):
            if later > epoch and self._begins_after(archive, later, until_ms):
                self.left_out = self._by_epoch[later][0].first
                self._by_epoch = {e: s for e, s in self._by_epoch.items() if e < later}
                return

    def _begins_after(self, archive: Archive, epoch: int, until_ms: int) -> bool:
        segments = self._by_epoch[epoch]
        origin = archive.origin(segments[0].shard, epoch)
        if origin is not None:
            return origin.at_ms > until_ms
        for segment in segments:
            for entry in archive.read(segment).entries:
                at_ms = at_ms_of(entry.command)
                if at_ms is not None and entry.index <= self._upto:
                    return at_ms > until_ms
        return False

    def parts(self) -> Iterator[tuple[Segment, int]]:
        """(segment, the last entry of it that counts)."""
        epochs = sorted(self._by_epoch)
        firsts = {epoch: self._by_epoch[epoch][0].first for epoch in epochs}
        for epoch in epochs:
            end = min((firsts[later] for later in epochs if later > epoch), default=None)
            for segment in self._by_epoch[epoch]:
                last = segment.last if end is None else min(segment.last, end - 1)
                if last >= segment.first:
                    yield segment, last


def gaps(segments: Sequence[Segment], after: int = 0) -> list[Gap]:
    """What is missing behind entry `after`, up to the last entry of `segments`."""
    found = []
    expected = after + 1
    for first, last in sorted((segment.first, segment.last) for segment in segments):
        if last < expected:
            continue
        if first > expected:
            found.append(Gap(expected, first - 1))
        expected = last + 1
    return found


def gap_error(shard: str, gap: Gap) -> RestoreImpossible:
    return RestoreImpossible(
        f"The archived log of shard {shard} lacks entries {gap.first} to {gap.last}.",
        hint="Restore a moment before them, or one after a later backup.",
        shard=shard,
    )
