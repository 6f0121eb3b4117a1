"""What a node takes from the machine: time, chance and disk, as interfaces.

Nothing else in `agentmem_cluster`, `agentmem_node.engine` or `agentmem_node.model` may ask
the operating system for any of them (`tests/test_layering.py` keeps it so): the same code
runs on a real machine (`agentmem_cluster.realtime`) and in the simulator
(`agentmem_chaos.sim`), where a seed decides all three.
"""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back. For timeouts and deadlines."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC. For record times only: it may jump."""
        ...


class Rng(Protocol):
    def random(self) -> float:
        """A float in [0, 1)."""
        ...

    def token(self, size_bytes: int) -> bytes:
        """`size_bytes` bytes, unpredictable on a real machine."""
        ...


class File(Protocol):
    """An open file. Every method may raise OSError (ENOSPC and EIO included)."""

    def pread(self, size_bytes: int, offset: int) -> bytes: ...

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`; not durable before `datasync`."""
        ...

    def datasync(self) -> None:
        """Return once all that was written is on stable storage. May be called off the loop."""
        ...

    def allocate(self, size_bytes: int) -> None:
        """Grow to at least `size_bytes`, filled with zeros."""
        ...

    def truncate(self, size_bytes: int) -> None: ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class Disk(Protocol):
    """A directory tree that one node owns. Paths are relative, with `/`."""

    def open(self, path: str, *, create: bool = False) -> File: ...

    def list(self, path: str) -> list[str]:
        """Names in a directory, sorted; empty when it does not exist."""
        ...

    def exists(self, path: str) -> bool: ...

    def make_dir(self, path: str) -> None: ...

    def rename(self, old: str, new: str) -> None:
        """Replace `new` atomically; durable after `sync_dir` of its directory."""
        ...

    def remove(self, path: str) -> None: ...

    def sync_dir(self, path: str) -> None: ...

    def free_bytes(self) -> int: ...
