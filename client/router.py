"""What all calls of one client share: its policy, the shard map, who is ill, the retry budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentmem_client.calls import Anywhere, Call, ToNode
from agentmem_client.topology import Shard, Topology


@dataclass(frozen=True, slots=True)
class Policy:
    """How long, how often and how much. Seconds, unless the name says otherwise."""

    deadline_s: float = 10.0
    batch_deadline_s: float = 60.0
    # One node that hangs may use this share of a call's deadline, so that others get a turn.
    attempt_share_max: float = 1 / 3
    attempt_s_min: float = 0.5
    backoff_s_first: float = 0.05
    backoff_s_max: float = 1.0
    redirects_max: int = 3
    attempts_max: int = 64
    avoid_s: float = 1.0
    # When not one node has answered, how long to go on trying; the deadline, if that is sooner.
    unreachable_s_max: float = math.inf
    retry_tokens_max: float = 500.0
    retry_tokens_per_s: float = 100.0
    retry_tokens_per_call: float = 0.2
    answer_bytes_max: int = 256 * 1024 * 1024


@dataclass(slots=True)
class Router:
    """Chooses nodes. `random`: floats in [0, 1)."""

    seeds: Sequence[str]
    random: Callable[[], float]
    policy: Policy = field(default_factory=Policy)
    api_key: str | None = None
    topology: Topology | None = None
    map_is_stale: bool = False
    _avoid_until: dict[str, float] = field(default_factory=dict)
    _retry_tokens: float = -1.0
    _tokens_at: float = 0.0

    def __post_init__(self) -> None:
        self._retry_tokens = self.policy.retry_tokens_max

    def learn(self, topology: Topology) -> None:
        """Take a map unless an older one came late. Same version: leaders may have moved."""
        if self.topology is None or topology.version >= self.topology.version:
            self.topology = topology
            self.map_is_stale = False

    def url_of(self, node: str | None) -> str | None:
        """The URL of a node by its id, as far as the map knows."""
        if node is None or self.topology is None:
            return None
        return self.topology.urls.get(node)

    def shard_of(self, call: Call[Any]) -> Shard | None:
        """The shard that a call belongs to; None when any node will do or no map is known."""
        if self.topology is None or isinstance(call.route, Anywhere | ToNode):
            return None
        return call.route.shard(self.topology)

    def candidates(self, call: Call[Any], now: float) -> list[str]:
        """URLs, best first: the shard's leader, its members, the other nodes; the ill ones last."""
        if isinstance(call.route, ToNode):
            return [call.route.url]
        ordered: list[str] = []
        topology = self.topology
        if topology is not None:
            shard = self.shard_of(call)
            if shard is not None:
                names = [*([shard.leader] if shard.leader else []), *shard.members]
                ordered += [topology.urls[name] for name in names if name in topology.urls]
            rest = list(topology.urls.values())
            # Calls that any node may answer are spread over the nodes.
            turn = int(self.random() * len(rest)) if rest and shard is None else 0
            ordered += rest[turn:] + rest[:turn]
        ordered += self.seeds
        return sorted(dict.fromkeys(ordered), key=lambda url: self.is_avoided(url, now))

    def avoid(self, url: str, now: float) -> None:
        """This node just failed: others are asked first for a while."""
        self._avoid_until[url] = now + self.policy.avoid_s

    def is_avoided(self, url: str, now: float) -> bool:
        return self._avoid_until.get(url, 0.0) > now

    def well(self, url: str) -> None:
        """This node answered."""
        self._avoid_until.pop(url, None)

    def earn(self) -> None:
        """A call succeeded: it pays for a part of somebody's retry."""
        self._retry_tokens = min(
            self.policy.retry_tokens_max, self._retry_tokens + self.policy.retry_tokens_per_call
        )

    def spend_retry(self, now: float) -> float:
        """Take one retry from the budget; returns the seconds until it is there.

        Who comes when the budget is spent waits behind those who came before: when a cluster
        is really down, thousands of callers retry at a steady rate, not in a storm.
        """
        elapsed = max(0.0, now - self._tokens_at)
        self._tokens_at = now
        self._retry_tokens = min(
            self.policy.retry_tokens_max,
            self._retry_tokens + elapsed * self.policy.retry_tokens_per_s,
        )
        self._retry_tokens -= 1.0
        if self._retry_tokens >= 0.0:
            return 0.0
        if self.policy.retry_tokens_per_s <= 0.0:
            return math.inf
        return -self._retry_tokens / self.policy.retry_tokens_per_s

    def give_back_retry(self) -> None:
        """A retry that was taken will not happen: its call ends before."""
        self._retry_tokens += 1.0
