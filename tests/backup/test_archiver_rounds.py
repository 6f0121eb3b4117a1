"""What a round of the archiver writes and says, at moments that are hard to meet on real nodes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agentmem_cluster.errors import NoQuorum
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.realtime import RealClock
from agentmem_node.backup.archive import Archive
from agentmem_node.backup.objects import open_store
from agentmem_node.service.archiver import Archiver

SHARD = "s00"


class AGroup:
    """One that leads, whose log begins at `first`."""

    is_leader = True

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.spec = SimpleNamespace(base_index=0)
        self.has_quorum = True

    def status(self) -> Any:
        return SimpleNamespace(first_index=self.first, applied_index=self.last)

    def read_log(self, after: int, size_bytes: int) -> list[Entry]:
        if after < self.first - 1:
            raise IndexError(after)
        return [Entry(index, 1, b"") for index in range(after + 1, self.last + 1)]

    def retain(self, index: int | None) -> None:
        pass

    async def read_index(self, *, deadline: float) -> int:
        if not self.has_quorum:
            raise NoQuorum("nobody confirms it")
        return self.last


def a_replica(group: AGroup, *, has_begun: bool = True) -> Any:
    return SimpleNamespace(
        info=SimpleNamespace(id=SHARD, epoch=1, slot_start=0, slot_end=16_384),
        group=group,
        machine=SimpleNamespace(has_begun=has_begun),
    )


def an_archiver(folder: Path) -> tuple[Archiver, Archive]:
    routing: Any = SimpleNamespace(local={})
    archiver = Archiver(
        routing, RealClock(), url=str(folder), period_s=1.0, cluster_id=lambda: "c1"
    )
    return archiver, Archive(open_store(str(folder)), "c1")


def test_a_leader_says_how_far_the_archive_is_when_it_knows_all_that_was_committed(
    tmp_path: Path,
) -> None:
    """One that has just come to lead does not: an acknowledged write may be missing."""
    archiver, archive = an_archiver(tmp_path)
    group = AGroup(1, 5)

    def round_of(replica: Any) -> None:
        asyncio.run(archiver._lead(archive, SHARD, replica))

    group.has_quorum = False
    round_of(a_replica(group))
    assert archive.segments(SHARD)[-1].last == 5
    assert archive.reached(SHARD) is None
    group.has_quorum = True
    round_of(a_replica(group, has_begun=False))  # where it began is not in its log yet
    assert archive.reached(SHARD) is None
    round_of(a_replica(group))
    reached = archive.reached(SHARD)
    assert reached is not None and reached.last == 5


def test_a_node_that_has_not_looked_at_the_archive_keeps_the_end_of_an_epoch(
    tmp_path: Path,
) -> None:
    """It started within the change: of the log it has only the end."""
    archiver, archive = an_archiver(tmp_path)
    archiver.leaving(a_replica(AGroup(50, 60)))
    assert asyncio.run(archiver._end_epochs(archive))
    assert [(s.first, s.last) for s in archive.segments(SHARD, 1)] == [(50, 60)]
