"""What a node says it takes part in is on its disk, or is not said."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.failpoints import arm
from agentmem_cluster.realtime import RealDisk, RealFaults


@pytest.mark.parametrize("point", ["record.before_write", "record.after_write"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_what_could_not_be_written_is_not_remembered_either(
    tmp_path: Path, point: str, error: str
) -> None:
    disk = RealDisk(tmp_path)
    record = LocalRecord("disk-1", is_admitted=True)
    record.hold("s00", Held(3, "s00-e3"))
    record.save(disk)
    arm(f"{point}=error:{error}", RealFaults())
    try:
        with pytest.raises(OSError, match=point), record.kept(disk):
            record.hold("s00", Held(4, "s00-e4", 17, 2))
        with pytest.raises(OSError, match=point), record.kept(disk):
            record.close("s00", 3)
    finally:
        arm("", RealFaults())
    assert record == LocalRecord.load(disk)
    assert record.held == {"s00": Held(3, "s00-e3")}
    with record.kept(disk):
        record.close("s00", 3)
    assert record == LocalRecord.load(disk)
    assert not record.held and not record.may_take_part("s00", 3)
