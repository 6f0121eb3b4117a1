"""GET /metrics: what this node did and is, as Prometheus reads it.

Counters of requests are kept here, as plain numbers of one event loop; everything else is read
from the node when somebody asks (`agentmem_node.observe.snapshot`). A tenant's series are shown
to that tenant only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from agentmem_node.observe.histogram import Histogram
from agentmem_node.observe.node_families import node_families
from agentmem_node.observe.snapshot import NodeSnapshot

# Tenants with series of their own; the rest share `_other`, or labels would grow without bound.
_TENANTS_MAX = 200
_OTHER = "_other"


@dataclass(slots=True)
class _Route:
    """Requests to one route."""

    by_status: dict[int, int] = field(default_factory=dict)
    seconds: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class _Tenant:
    added: int = 0
    searches: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class InFlight:
    """What the HTTP server is busy with at this moment."""

    by_class: dict[str, int]
    connections: int
    body_bytes: int
    refused: int  # requests answered 429 since the start
    refused_connections: int


class Metrics:
    """Counts requests, and shows the node's whole state on demand."""

    def __init__(self, snapshot: Callable[[], NodeSnapshot]) -> None:
        self._snapshot = snapshot
        self._in_flight: Callable[[], InFlight] | None = None
        self._routes: dict[tuple[str, str], _Route] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)

    def watch(self, in_flight: Callable[[], InFlight]) -> None:
        """Let the HTTP server say what it is busy with."""
        self._in_flight = in_flight

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request. `route` is a template, never a path: paths are unbounded."""
        counted = self._routes.get((method, route))
        if counted is None:
            counted = self._routes[method, route] = _Route()
        counted.by_status[status] = counted.by_status.get(status, 0) + 1
        counted.seconds.observe(seconds)

    def searched(self, tenant: str, seconds: float) -> None:
        self._tenant(tenant).searches.observe(seconds)

    def added(self, tenant: str, memories: int) -> None:
        self._tenant(tenant).added += memories

    def _tenant(self, name: str) -> _Tenant:
        counted = self._tenants.get(name)
        if counted is None:
            if len(self._tenants) >= _TENANTS_MAX:
                name = _OTHER
            counted = self._tenants.setdefault(name, _Tenant())
        return counted

    def exposition(self, tenant: str) -> tuple[str, bytes]:
        """(content type, body): the node's series, and those of `tenant`."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(lambda: self._families(tenant)))
        return CONTENT_TYPE_LATEST, generate_latest(registry) + generate_latest(self._process)

    def _families(self, tenant: str) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield from self._tenant_families(tenant)
        yield from self._http_families()
        yield from node_families(snapshot)

    def _tenant_families(self, tenant: str) -> Iterator[Metric]:
        counted = self._tenants.get(tenant, _Tenant())
        added = CounterMetricFamily(
            "agentmem_add_memory",
            "Memories added through this node.",
            labels=["tenant"],
        )
        added.add_metric([tenant], counted.added)
        yield added
        searches = HistogramMetricFamily(
            "agentmem_search_duration_seconds",
            "Time of a search in this node, without reading and writing HTTP.",
            labels=["tenant"],
        )
        searches.add_metric([tenant], counted.searches.buckets(), counted.searches.sum_s)
        yield searches

    def _http_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "agentmem_http_requests",
            "Answered requests.",
            labels=["method", "route", "status"],
        )
        seconds = HistogramMetricFamily(
            "agentmem_http_request_duration_seconds",
            "Time from a request's headers to its answer.",
            labels=["method", "route"],
        )
        for (method, route), counted in sorted(self._routes.items()):
            for status, count in sorted(counted.by_status.items()):
                requests.add_metric([method, route, str(status)], count)
            seconds.add_metric([method, route], counted.seconds.buckets(), counted.seconds.sum_s)
        yield requests
        yield seconds
        if self._in_flight is None:
            return
        now = self._in_flight()
        in_flight = GaugeMetricFamily(
            "agentmem_http_requests_in_flight", "Requests being worked on.", labels=["class"]
        )
        for name, count in sorted(now.by_class.items()):
            in_flight.add_metric([name], count)
        yield in_flight
        yield GaugeMetricFamily(
            "agentmem_http_connections", "Open HTTP connections.", now.connections
        )
        yield GaugeMetricFamily(
            "agentmem_http_body_bytes", "Bodies held at this moment.", now.body_bytes
        )
        yield CounterMetricFamily(
            "agentmem_http_requests_refused", "Requests answered 429.", now.refused
        )
        yield CounterMetricFamily(
            "agentmem_http_connections_refused",
            "Connections closed at once, over limits.connections_max.",
            now.refused_connections,
        )


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()
