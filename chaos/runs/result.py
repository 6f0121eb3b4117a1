"""The result of a run, and where results are kept: ./chaos-runs/NAME-SEED-TIME/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmem_chaos.checkers.base import Crash, Damage, Finding, Refusal, Verdict
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.runs.observer import LeaderChange
from agentmem_chaos.runs.strikes import Struck
from agentmem_chaos.workloads.history import Op

FOLDER = Path("chaos-runs")
RESULT = "result.json"
OPERATIONS = "operations.json"
TIMELINE = "timeline.html"


@dataclass(slots=True)
class RunResult:
    """`interrupted`: ended early, by Ctrl-C; what was seen until then is checked all the same."""

    scenario: str
    workload: str
    nemeses: tuple[str, ...]
    hosts: str
    nodes: tuple[str, ...]
    clients: int
    seed: int
    seconds: float
    command: str
    started_at: str
    interrupted: bool = False
    ended_s: float = 0.0
    converged_s: float | None = None
    findings: Sequence[Finding] = ()
    struck: Sequence[Struck] = ()
    leaders: Sequence[LeaderChange] = ()
    refusals: Sequence[Refusal] = ()
    crashes: Sequence[Crash] = ()
    damages: Sequence[Damage] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    ops: Sequence[Op] = ()

    @property
    def passed(self) -> bool:
        """An unknown verdict is no pass, and neither is a fault that could not be made."""
        bad = (Verdict.VIOLATED, Verdict.UNKNOWN)
        return not any(f.verdict in bad for f in self.findings) and not any(
            fault.failed for fault in self.struck
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "workload": self.workload,
            "nemeses": list(self.nemeses),
            "hosts": self.hosts,
            "nodes": list(self.nodes),
            "clients": self.clients,
            "seed": self.seed,
            "seconds": self.seconds,
            "command": self.command,
            "started_at": self.started_at,
            "interrupted": self.interrupted,
            "ended_s": round(self.ended_s, 3),
            "converged_s": None if self.converged_s is None else round(self.converged_s, 3),
            "passed": self.passed,
            "findings": [finding.as_json() for finding in self.findings],
            "faults": [fault.as_json() for fault in self.struck],
            "leaders": [[c.at_s, c.shard, c.term, c.leader] for c in self.leaders],
            "refusals": [
                {
                    "node": r.node,
                    "shard": r.shard,
                    "asked": r.asked,
                    "at_s": round(r.at_s, 3),
                    "took_s": round(r.took_s, 3),
                    "status": r.status,
                    "code": r.code,
                }
                for r in self.refusals
            ],
            "crashes": [{"node": c.node, "at_s": round(c.at_s, 3)} for c in self.crashes],
            "damages": [
                {"node": d.node, "file": d.file, "how": d.how, "outcome": d.outcome}
                for d in self.damages
            ],
            "figures": self.figures,
        }


def save(result: RunResult, folder: Path) -> None:
    document = json.dumps(result.as_json(), indent=1) + "\n"
    (folder / RESULT).write_text(document)
    operations = json.dumps([op.as_json() for op in result.ops], separators=(",", ":"))
    (folder / OPERATIONS).write_text(operations + "\n")


def find_run(name: str | None, base: Path = FOLDER) -> Path:
    """The folder of a run by its name or path; None: the latest. Raises ChaosError."""
    if name is not None:
        for folder in (Path(name), base / name):
            if (folder / RESULT).is_file():
                return folder
        raise ChaosError(f"There is no run {name!r} here or below {base}.")
    runs = [folder for folder in base.glob("*") if (folder / RESULT).is_file()]
    if not runs:
        raise ChaosError(f"There is no run below {base}: `agentmem-chaos run smoke` makes one.")
    return max(runs, key=lambda folder: (folder / RESULT).stat().st_mtime)


def load(folder: Path) -> dict[str, Any]:
    """The result as JSON. Raises ChaosError."""
    try:
        document: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return document
    except (OSError, ValueError) as error:
        raise ChaosError(f"{folder / RESULT} cannot be read: {error}.") from error
