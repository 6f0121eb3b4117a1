"""Walks through every page of shards' files, in a process of its own: `python -m ... FOLDER...`.

LMDB believes what its pages say of themselves. One that has rotted may end the process that looks
at it, by a signal, and at every start again. So somebody else looks first (`find_broken`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import lmdb

from agentmem_node.storage.checkpoint import (
    DATA_NAME,
    StorageDamaged,
    read_checkpoint,
    restore_metas,
)
from agentmem_node.storage.layout import DATABASES

log = logging.getLogger("agentmem.walk")

_OK: Final = "ok"
# What a process does to itself; others are sent by somebody.
_BY_ITSELF: Final = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
# A walk that takes longer is given up: what it has not seen is taken as it is.
_SECONDS_MAX: Final = 30.0


def walk(folder: Path) -> None:
    """Look at every row of a shard that nobody has open.

    Raises lmdb.Error, StorageDamaged, OSError.
    """
    restore_metas(folder, read_checkpoint(folder))
    env = lmdb.open(
        os.fspath(folder), readonly=True, lock=False, max_dbs=len(DATABASES) + 1, readahead=False
    )
    try:
        end = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (folder / DATA_NAME).stat().st_size < end:
            return  # who opens it says so; to read past its end would be a signal as well
        with env.begin() as txn:
            for name in DATABASES:
                if txn.get(name.encode()) is None:
                    continue  # of an earlier version
                for _ in txn.cursor(db=env.open_db(name.encode(), txn=txn, create=False)):
                    pass
    finally:
        env.close()


async def find_broken(folders: Sequence[Path]) -> set[Path]:
    """Those that end whoever walks through them. Nothing has them open."""
    left = [folder for folder in folders if folder.is_dir()]
    broken: set[Path] = set()
    try:
        async with asyncio.timeout(_SECONDS_MAX):
            while left:
                seen, ended_by = await _walk_through(left)
                if seen == len(left):
                    break
                # Twice: memory may fail once, and for that no replica is given up.
                if ended_by not in _BY_ITSELF or (await _walk_through([left[seen]]))[0] == 1:
                    log.warning("who walked through %s was ended by %s", left[seen], ended_by)
                else:
                    log.error("%s ends who reads it, by %s", left[seen], ended_by)
                    broken.add(left[seen])
                left = left[seen + 1 :]
    except (TimeoutError, OSError) as error:
        log.warning("not every shard's file was walked through: %s", error or "it takes too long")
    return broken


async def _walk_through(folders: Sequence[Path]) -> tuple[int, str]:
    """How many were walked through, and the signal that ended the walker ("" for none)."""
    walker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        *map(os.fspath, folders),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        said, _ = await walker.communicate()
    finally:
        if walker.returncode is None:
            walker.kill()
            await walker.wait()
    code = walker.returncode or 0
    return said.decode().split().count(_OK), signal.Signals(-code).name if code < 0 else ""


def main() -> None:
    for folder in sys.argv[1:]:
        try:
            walk(Path(folder))
        except (lmdb.Error, StorageDamaged, OSError):
            pass  # who opens it meets the same, and says it in words
        print(_OK, flush=True)


if __name__ == "__main__":
    main()
