"""What all calls of one client share: the shard map, the nodes' health, latencies, budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentmem_client.breaker import Breaker, Cause
from agentmem_client.budgets import HedgeBudget, RetryBudget
from agentmem_client.calls import Anywhere, Call, ToNode
from agentmem_client.latency import Bounds, Latencies
from agentmem_client.policy import Policy
from agentmem_client.topology import Shard, Topology

_NEVER = float("-inf")


@dataclass(slots=True)
class Router:
    """Chooses nodes. `random`: floats in [0, 1)."""

    seeds: Sequence[str]
    random: Callable[[], float]
    policy: Policy = field(default_factory=Policy)
    api_key: str | None = None
    topology: Topology | None = None
    map_is_stale: bool = False
    retries: RetryBudget = field(init=False)
    hedges: HedgeBudget = field(init=False)
    _breakers: dict[str, Breaker] = field(default_factory=dict)
    _heard_at: dict[str, float] = field(default_factory=dict)
    _latencies: dict[str, Latencies] = field(default_factory=dict)
    _ill: set[str] = field(default_factory=set)  # whose breaker is not closed

    def __post_init__(self) -> None:
        self.retries = RetryBudget(self.policy)
        self.hedges = HedgeBudget(self.policy)

    # -- the map --------------------------------------------------------------------------

    def learn(self, topology: Topology) -> None:
        """Take a map unless an older one came late. Same version: leaders may have moved."""
        if self.topology is None or topology.version >= self.topology.version:
            self.topology = topology
            self.map_is_stale = False
            self._forget_all_but({*topology.urls.values(), *self.seeds})

    def _forget_all_but(self, known: set[str]) -> None:
        """A node that moved has another address: the old one is not probed for ever."""
        for url in [url for url in self._breakers if url not in known]:
            del self._breakers[url]
            self._ill.discard(url)
        for url in [url for url in self._heard_at if url not in known]:
            del self._heard_at[url]

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

    def candidates(self, call: Call[Any]) -> list[str]:
        """URLs, best first: the shard's leader, its members, the other nodes; the ill ones last,
        and of those the silent ones."""
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
        found = list(dict.fromkeys(ordered))
        if self._ill:
            found.sort(key=self._rank)
        return found

    def _rank(self, url: str) -> int:
        breaker = self._breakers.get(url)
        if breaker is None or breaker.is_closed:
            return 0
        return 1 if breaker.cause is Cause.REFUSING else 2

    # -- the nodes ------------------------------------------------------------------------

    @property
    def has_ill(self) -> bool:
        return bool(self._ill)

    def is_ill(self, url: str) -> bool:
        return url in self._ill

    def is_silent(self, url: str, since: float) -> bool:
        """Whether the node has answered nothing at all since then."""
        return self._heard_at.get(url, _NEVER) <= since

    def heard(self, url: str, now: float) -> None:
        """The node answered something, so it runs."""
        self._heard_at[url] = now

    def served(self, url: str, sent_at: float) -> None:
        """The node did what a request asked for, or refused it for a reason of the request."""
        breaker = self._breakers.get(url)
        if breaker is not None:
            breaker.succeeded(sent_at)
            self._note(url, breaker)

    def failed(self, url: str, now: float, cause: Cause, *, is_certain: bool) -> None:
        breaker = self._breakers.get(url)
        if breaker is None:
            breaker = self._breakers[url] = Breaker(self.policy)
        if breaker.failed(now, cause, is_certain=is_certain):
            self.map_is_stale = True  # what it led has, or soon has, another leader
        self._note(url, breaker)

    def probes_due(self, now: float) -> list[str]:
        """URLs of ill nodes to be probed now, each to be reported by `probed`."""
        if not self._ill:
            return []
        return [url for url in sorted(self._ill) if self._breakers[url].take_probe(now)]

    def probed(self, url: str, now: float, status: int | None) -> None:
        """What `GET /health/ready` gave: an HTTP status, or None when no answer came in time."""
        breaker = self._breakers.get(url)
        if breaker is None:
            return  # not of the cluster any more
        if status is not None:
            self.heard(url, now)
        cause = Cause.SILENT if status is None else Cause.REFUSING
        breaker.probed(now, is_well=status == 200, cause=cause)
        # Well again it may lead again; ill still, an election may have ended since.
        self.map_is_stale = True
        self._note(url, breaker)

    def _note(self, url: str, breaker: Breaker) -> None:
        if breaker.is_closed:
            self._ill.discard(url)
        else:
            self._ill.add(url)

    # -- hedging --------------------------------------------------------------------------

    def took(self, call: Call[Any], seconds: float) -> None:
        """A call was answered, or took at least so long."""
        latencies = self._latencies.get(call.name)
        if latencies is None:
            latencies = self._latencies[call.name] = Latencies()
        latencies.add(seconds)

    def hedge_bounds(self, call: Call[Any]) -> Bounds:
        policy = self.policy
        if call.name.endswith("_many"):
            return Bounds(
                policy.hedge_batch_s_first, policy.hedge_batch_s_min, policy.hedge_batch_s_max
            )
        if call.idempotency_key is not None:
            return Bounds(
                policy.hedge_write_s_first, policy.hedge_write_s_min, policy.hedge_write_s_max
            )
        return Bounds(policy.hedge_s_first, policy.hedge_s_min, policy.hedge_s_max)

    def hedge_after(self, call: Call[Any]) -> float:
        """Seconds after which a call that has no answer is asked of another node too."""
        bounds = self.hedge_bounds(call)
        latencies = self._latencies.get(call.name)
        if latencies is None:
            return bounds.first_s
        return latencies.hedge_after(self.policy.hedge_quantile, bounds)
