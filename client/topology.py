"""The shard map as a client needs it: which node leads the shard of an owner or of a memory.

Read from `GET /api/v1/cluster`. Everything here is a value: a newer map replaces an older one
whole. A map is advice, never authority: a request that reaches the wrong node is forwarded by
it or refused with `wrong_shard`, and costs a hop, not an error.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from agentmem_client.errors import ProtocolError
from agentmem_cluster.ring import slot_of, slot_of_id


@dataclass(frozen=True, slots=True)
class Shard:
    id: str
    epoch: int
    members: tuple[str, ...]
    leader: str | None


@dataclass(frozen=True, slots=True)
class Topology:
    """`starts`: first slots of ranges, ascending; `shards_by_range`: the shard of each."""

    version: int
    tenant: str
    urls: Mapping[str, str]
    shards: Mapping[str, Shard]
    starts: tuple[int, ...] = ()
    shards_by_range: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def shard_at(self, slot: int) -> Shard | None:
        at = bisect.bisect_right(self.starts, slot) - 1
        return self.shards.get(self.shards_by_range[at]) if at >= 0 else None

    def shard_of_owner(self, owner: str) -> Shard | None:
        return self.shard_at(slot_of(self.tenant, owner))

    def shard_of_memory(self, memory_id: str) -> Shard | None:
        try:
            return self.shard_at(slot_of_id(UUID(memory_id).bytes))
        except ValueError:
            return None  # any node answers such an id with a clear error

    @classmethod
    def read(cls, view: Mapping[str, Any]) -> Topology:
        """From the JSON of `GET /cluster`. Raises ProtocolError when it is not one."""
        try:
            nodes = view["nodes"]
            shards = {
                str(name): Shard(
                    id=str(name),
                    epoch=int(shard["epoch"]),
                    members=tuple(shard["members"]),
                    leader=shard.get("leader"),
                )
                for name, shard in view["shards"].items()
            }
            ranges = sorted(
                (int(first), str(name))
                for name, shard in view["shards"].items()
                for first, _last in shard["slots"]
            )
            return cls(
                version=int(view["version"]),
                tenant=str(view.get("tenant") or "default"),
                urls={
                    str(name): str(node["http"]).rstrip("/")
                    for name, node in nodes.items()
                    if node.get("http") and _can_be_called(str(node["http"]))
                },
                shards=shards,
                starts=tuple(first for first, _ in ranges),
                shards_by_range=tuple(name for _, name in ranges),
                raw=view,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            raise ProtocolError(
                f"GET /cluster did not answer with a shard map ({wrong!r}). "
                "Is the URL an AgentMem node's?"
            ) from wrong


def _can_be_called(url: str) -> bool:
    """Not what a node listens on when it listens everywhere: here, that would be this machine."""
    return urlsplit(url).hostname not in ("0.0.0.0", "::")
