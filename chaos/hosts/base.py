"""What a scenario may ask of the hosts of a cluster, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol

Pair = tuple[str, str]  # (sender, receiver): what the first sends to the second


class Need(Enum):
    """What a nemesis needs; hosts say which they have, and why not."""

    SIGNALS = "signals to node processes"
    PARTITION = "cuts between nodes"
    PEER_PROXY = "a proxy between nodes"
    CLIENT_PROXY = "a proxy before the nodes' HTTP"
    DATA = "the nodes' data directories"
    CLOCK = "libfaketime"
    FAILING_CALLS = "libfiu"
    SMALL_DISK = "a small disk of its own for each node"
    NEW_NODES = "room for further nodes"


class Hosts(Protocol):
    """Nodes are named n1, n2, ... Every method has a deadline; ChaosError says what failed."""

    kind: str
    nodes: tuple[str, ...]
    api_key: str

    def why_not(self, need: Need) -> str | None:
        """None when the need is met here, else the reason and the remedy."""
        ...

    def url(self, node: str) -> str:
        """The node's HTTP API, without a proxy in between: for observers."""
        ...

    def client_url(self, node: str) -> str:
        """The node's HTTP API as clients reach it."""
        ...

    async def open(self, equip: frozenset[Need], seconds: float = 60.0) -> None:
        """Make everything and start every node, equipped for these needs. A small disk has room
        for the work of `seconds`."""
        ...

    async def close(self) -> None:
        """End everything that `open` began, however far it came."""
        ...

    # -- processes --------------------------------------------------------------------------

    async def join(self, token: str) -> str:
        """Start a further node, which joins with the token; its name is in `nodes` from then on."""
        ...

    def is_running(self, node: str) -> bool: ...

    async def start(self, node: str) -> None:
        """Start a node that is not running; does not wait until it is ready."""
        ...

    async def stop(self, node: str) -> None:
        """As an operator does: SIGTERM, and SIGKILL when it takes too long."""
        ...

    async def kill(self, node: str) -> None: ...

    async def pause(self, node: str) -> None: ...

    async def resume(self, node: str) -> None: ...

    def log(self, node: str) -> str:
        """Everything the node printed, of all its lives."""
        ...

    def log_tail(self, node: str) -> str: ...

    def exit_code(self, node: str) -> int | None:
        """Of a node that ended; negative: the signal that ended it."""
        ...

    # -- network ----------------------------------------------------------------------------

    async def cut(self, lost: frozenset[Pair]) -> None:
        """From now on these bytes are lost without a trace, and no others."""
        ...

    async def peer_toxic(
        self, pair: Pair, kind: str, attributes: Mapping[str, int], toxicity: float = 1.0
    ) -> None:
        """A toxic on what the first of the pair sends to the second."""
        ...

    async def client_toxic(
        self,
        node: str,
        kind: str,
        stream: str,
        attributes: Mapping[str, int],
        toxicity: float = 1.0,
    ) -> None:
        """`stream`: "upstream" befalls requests, "downstream" answers."""
        ...

    async def clear_toxics(self) -> None:
        """No cut and no toxic is left."""
        ...

    # -- the machine ------------------------------------------------------------------------

    def data_dir(self, node: str) -> Path: ...

    async def set_clock(self, node: str, offset_s: float) -> None:
        """The node's wall clock is off by so much from now on; its monotonic clock is not."""
        ...

    async def fail_calls(self, node: str, point: str, probability: float, errno: int) -> None:
        """System calls behind libfiu's failure point fail with `errno`; probability 0: no more."""
        ...

    def disk(self, node: str) -> Path:
        """Where the node's small disk is mounted."""
        ...
