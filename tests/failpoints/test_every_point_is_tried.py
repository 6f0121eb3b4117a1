"""No failpoint without a process that ends at it."""

from __future__ import annotations

from agentmem_cluster.failpoints import POINTS
from tests.failpoints import (
    test_lost_disk_process,
    test_move_path_process,
    test_split_path_process,
    test_write_path_process,
)


def test_every_failpoint_has_a_case() -> None:
    write, move = test_write_path_process, test_move_path_process
    tried = {
        *(point for point in POINTS if point.startswith("journal.")),
        *(*write.SHORT, *write.LONG, *write.RECOVERY, *write.FOUNDING),
        *(point for _, point in (*move.SHORT, *move.LONG)),
        *test_lost_disk_process.POINTS,
        *test_split_path_process.POINTS,
    }
    assert tried == set(POINTS)
