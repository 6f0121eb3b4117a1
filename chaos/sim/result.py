"""What playing a world came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentmem_chaos.sim.story import Line


@dataclass(frozen=True, slots=True)
class WorldResult:
    """Plain values: it crosses processes and becomes JSON."""

    seed: int
    violations: list[str]
    nodes: int = 0
    groups: int = 0
    engine: str = ""
    core_clients: bool = False
    seconds: float = 0.0  # virtual
    calls: int = 0
    acknowledged: int = 0
    reads: int = 0
    faults: int = 0
    elections: int = 0
    audits: int = 0
    left_behind: int = 0  # replicas that lack what no log has any more
    has_moves: bool = False
    moves: int = 0  # epochs that began
    splits: int = 0
    rewinds: int = 0
    pauses_s: list[float] = field(default_factory=list)  # of writes, at each
    events: int = 0
    bursts: int = 0
    checker_steps: int = 0
    trace_hash: str = ""
    lines: list[Line] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.violations
