"""How every benchmark says what it measured: rows with a unit and a target, as table and JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Row:
    name: str
    value: float
    unit: str
    target: float | None = None
    lower_is_better: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("")
    for row in rows:
        sign = "<=" if row.lower_is_better else ">="
        met = row.met
        table.add_row(
            row.name,
            f"{number(row.value)} {row.unit}".rstrip(),
            "" if row.target is None else f"{sign} {number(row.target)} {row.unit}".rstrip(),
            "" if met is None else "[green]met[/]" if met else "[red]MISSED[/]",
        )
    console.print(table)


def number(value: float) -> str:
    """Three figures that mean something; thousands with commas."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def document(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "title": title,
        "machine": machine(),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
    }


def benchmark_main(
    title: str, measure: Callable[[float, Callable[[str], None]], list[Row]]
) -> None:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the data set, 0 to 1")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = measure(arguments.scale, lambda text: console.print(f"[dim]{text} ...[/]"))
    show(title, rows, Console())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document(title, rows), indent=1) + "\n")
    sys.exit(0)
