"""What the handlers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agentmem_node.api.admission import Admission
from agentmem_node.config_keys import Config
from agentmem_node.model.limits import Limits
from agentmem_node.observe.metrics import Metrics
from agentmem_node.service.contract import NodeService


@dataclass(slots=True)
class Api:
    """One node's HTTP API. `clock`: monotonic seconds, the clock of deadlines."""

    service: NodeService
    config: Config
    metrics: Metrics
    clock: Callable[[], float]
    document: bytes  # /openapi.json
    limits: Limits = field(init=False)
    admission: Admission = field(init=False)
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.limits = self.config.limits
        self.admission = Admission(self.limits)
