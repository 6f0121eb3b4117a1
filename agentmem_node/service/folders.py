"""The folders of this node's replicas, and of the copies that are to be replicas.

s00-e2           a replica of epoch 2 of s00 or of a later one, or a copy on its way to be one
s00-e2.partial   what of it is on the disk already: the next attempt compares it, chunk by chunk
s00-e2.fetch*    what of it was fetched out of a backup so far
*.gone, *.new    half removed, half made: of no use after a crash
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from agentmem_cluster.epochs.replicas import ReplicaSet
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.runtime import Clock
from agentmem_node.engine.shard import Shard
from agentmem_node.storage.snapshot import discard, partial_folder

log = logging.getLogger("agentmem.replicas")

_SWEEP_S: Final = 60.0


class Folders:
    def __init__(self, root: Path, replicas: ReplicaSet, clock: Clock) -> None:
        self._root = root
        self._set = replicas
        self._clock = clock
        self._lingering: list[tuple[float, Shard, Path]] = []
        self._sweep_s = clock.monotonic() + _SWEEP_S

    def path(self, name: str) -> Path:
        return self._root / name

    def known(self) -> list[Path]:
        """Those that this node's record tells of, the meta group's aside."""
        record = self._set.record
        held = [one.folder for shard, one in record.held.items() if shard != GROUP_META]
        return [self.path(name) for name in sorted({*held, *self._ready()})]

    def _ready(self) -> set[str]:
        return {ready.folder for ready in self._set.record.ready.values()}

    def step(self, now_s: float) -> None:
        """Close and remove what may go by now."""
        self._close_lingering(now_s)
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + _SWEEP_S
            self.sweep()

    def close(self) -> None:
        for _, state, _ in self._lingering:
            state.abandon()

    # -- of one shard ----------------------------------------------------------------------------

    def let_go(self, name: str, state: Shard, linger_s: float = 0.0) -> None:
        """Close the state in a folder in `linger_s`, and remove it unless somebody uses it then:
        requests that began before may still read it."""
        self._lingering.append((self._clock.monotonic() + linger_s, state, self.path(name)))

    def _close_lingering(self, now_s: float) -> None:
        due = [one for one in self._lingering if one[0] <= now_s]
        self._lingering = [one for one in self._lingering if one[0] > now_s]
        for _, state, folder in due:
            state.abandon()
            if folder.name not in self._set.folders_in_use():
                self._discard(folder)

    def put_aside(self, name: str) -> None:
        """Let what is there serve the next attempt. Raises OSError."""
        folder = self.path(name)
        if folder.exists():
            self._discard(partial_folder(folder))
            folder.rename(partial_folder(folder))

    def discard(self, name: str) -> None:
        self._discard(self.path(name))

    def discard_fetched(self, name: str) -> None:
        """What was fetched out of a backup so far, for a copy that is not wanted any more."""
        for path in sorted(self._root.glob(f"{name}.fetch*")):
            self._remove(path)

    # -- of all of them --------------------------------------------------------------------------

    def tidy_up(self) -> None:
        """What a crash left behind, at a start: copies are kept to go on with, all else goes."""
        if not self._root.is_dir():
            return
        in_use = self._set.folders_in_use()
        for folder in sorted(self._root.iterdir()):
            name = folder.name.removesuffix(".partial")
            if name in in_use or folder.name.endswith(".partial") or ".fetch" in name:
                continue  # what was being fetched out of a backup says itself whose it is
            if folder.name.endswith((".gone", ".new")) or partial_folder(folder).exists():
                self._discard(folder)
            elif folder.is_dir():
                folder.rename(partial_folder(folder))

    def sweep_soon(self) -> None:
        """There may be room to make."""
        self._sweep_s = 0.0

    def sweep(self) -> None:
        """What was copied for an epoch that is here, or over, and is nobody's: a copy that was
        given up, a replica that was put aside. Only a later epoch's may still be gone on with."""
        shard_map = self._set.map
        if shard_map is None or not self._root.is_dir():
            return
        kept = self._set.folders_in_use() | self._ready()
        kept |= {folder.name for _, _, folder in self._lingering}
        for path in sorted(self._root.iterdir()):
            name = path.name.partition(".")[0]  # of a part of it, or of what is fetched for it
            shard, _, epoch = name.rpartition("-e")
            info = shard_map.shards.get(shard)
            if name in kept or info is None or not epoch.isdecimal() or int(epoch) > info.epoch:
                continue
            served = self._set.served.get(shard)
            is_here = served is not None and served.info.epoch >= info.epoch
            if self._set.node_id in info.members and not is_here:
                continue  # a copy goes on with it, or what was put aside may be the last there is
            log.info("removing %s, which is of no more use", path)
            self._remove(path)

    # -- within ----------------------------------------------------------------------------------

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            self._discard(path)
        else:
            with suppress(OSError):
                path.unlink()

    def _discard(self, folder: Path) -> None:
        try:
            discard(folder)
        except OSError as error:
            log.warning("cannot remove %s: %s", folder, error)
