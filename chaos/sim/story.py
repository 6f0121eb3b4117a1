"""What happened in a world: lines for people, and a hash over everything for the machine."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

# A minute's world tells about a thousand lines; one that runs amok must not eat the memory.
LINES_MAX = 20_000


class Line(NamedTuple):
    at_s: float
    who: str  # a node, "client 3", or "" for the world
    what: str

    def __str__(self) -> str:
        return f"{self.at_s:9.4f} s  {self.who:<9} {self.what}"


class Story:
    """Keeps the lines when asked to; the trace hash covers lines and network bytes always."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._hash = hashlib.blake2b(digest_size=16)
        self.lines: list[Line] = []

    def tell(self, at_s: float, who: str, what: str) -> None:
        line = Line(at_s, who, what)
        self._hash.update(str(line).encode())
        if self._keep and len(self.lines) < LINES_MAX:
            self.lines.append(line)

    def trace(self, data: bytes) -> None:
        self._hash.update(data)

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()
