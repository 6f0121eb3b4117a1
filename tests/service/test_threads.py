"""What a task gave to a thread is over when the task is, however that ended."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from agentmem_cluster.realtime import RealClock
from agentmem_node.service.copying import Pace, receive
from agentmem_node.service.threads import to_its_end, unless_called_off
from agentmem_node.storage.snapshot import SnapshotWriter

WAIT_S = 10.0
PAGE = b"a page of it"


def test_a_cancelled_task_waits_for_its_thread() -> None:
    begun, may_end, steps = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        assert may_end.wait(WAIT_S)
        steps.append("the thread")

    async def scenario() -> None:
        task = asyncio.create_task(to_its_end(work))
        await asyncio.to_thread(begun.wait, WAIT_S)
        for _ in range(3):  # whoever is impatient too
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        steps.append("the task")

    asyncio.run(scenario())
    assert steps == ["the thread", "the task"]


def test_work_that_can_be_called_off_ends_early() -> None:
    called_off = threading.Event()

    async def scenario() -> None:
        task = asyncio.create_task(unless_called_off(called_off.set, called_off.wait, WAIT_S))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S / 2)

    asyncio.run(scenario())


def test_what_the_thread_raises_or_returns_comes_through() -> None:
    async def scenario() -> None:
        assert await to_its_end(max, 3, 4) == 4
        with pytest.raises(ZeroDivisionError):
            await to_its_end(lambda: 1 // 0)

    asyncio.run(scenario())


def test_a_cancelled_copy_renames_nothing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last step went on in a thread, and gave its folder the name of the next attempt's."""
    syncing, may_end = threading.Event(), threading.Event()
    finish = SnapshotWriter.finish

    def slowly(self: SnapshotWriter, checkpoint: Any) -> None:
        syncing.set()
        assert may_end.wait(WAIT_S)
        finish(self, checkpoint)

    monkeypatch.setattr(SnapshotWriter, "finish", slowly)
    folder = tmp_path / "s00-e0000000002"

    async def ask(method: str, body: dict[str, Any]) -> Any:
        if method == "replica.open":
            opened = {"metas": b"", "state": b"", "index": 1, "term": 1}
            return opened | {"snapshot": "x", "bytes": len(PAGE)}
        return {"data": PAGE, "crc": crc32(PAGE)}

    async def scenario() -> None:
        pace = Pace(1 << 30, RealClock())
        task = asyncio.create_task(receive(ask, "s00", 1, folder, pace, lambda done, total: None))
        await asyncio.to_thread(syncing.wait, WAIT_S)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        may_end.set()
        await asyncio.wait([task])
        before = folder.exists()
        await asyncio.sleep(0.2)
        assert folder.exists() == before

    asyncio.run(scenario())
