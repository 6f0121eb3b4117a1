"""All figures of docs/benchmarks.md: `make bench`.

    python -m benchmarks.run [--only vs_chroma,failover] [--scale 0.1] [--out FOLDER]

Each part runs as a process of its own, so that one that fails leaves the others their say. Writes
one JSON file a part and docs/benchmarks.md's table to standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import number

PARTS = {
    "raft": "benchmarks.raft",
    "storage": "benchmarks.storage",
    "search_core": "benchmarks.search_core",
    "vs_chroma": "benchmarks.vs_chroma",
    "embed": "benchmarks.embed",
    "footprint": "benchmarks.footprint",
    "failover": "benchmarks.failover",
    "rolling": "benchmarks.rolling",
    "backup": "benchmarks.backup",
    "partition": "benchmarks.partition",
    "growth": "benchmarks.growth",
}
_PART_S_MAX = 1_800


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--scale", default="1", help="part of the data sets, 0 to 1")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in arguments.only.split(","):
        if part not in PARTS:
            parser.error(f"there is no part {part!r}: {', '.join(PARTS)}")
        console.rule(part)
        target = arguments.out / f"{part}.json"
        command = [sys.executable, "-m", PARTS[part], "--scale", arguments.scale]
        try:
            done = subprocess.run([*command, "--json", str(target)], timeout=_PART_S_MAX)
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = f"no end after {_PART_S_MAX} s"
        if code != 0:
            failed.append(part)
            console.print(f"[red]{part} failed: {code}[/]")
    (arguments.out / "table.md").write_text(markdown(arguments.out))
    console.print(f"\nFigures: {arguments.out}/*.json, table: {arguments.out}/table.md")
    if failed:
        console.print(f"[red]Failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


def markdown(folder: Path) -> str:
    """The table of all parts that were measured."""
    lines = ["| what | measured | target | |", "|---|---|---|---|"]
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        document: dict[str, Any] = json.loads(path.read_text())
        for row in document["rows"]:
            sign = "<=" if row["lower_is_better"] else ">="
            wanted = row["target"]
            target = "" if wanted is None else f"{sign} {number(wanted)} {row['unit']}"
            met = {None: "", True: "met", False: "**missed**"}[row["met"]]
            measured = f"{number(row['value'])} {row['unit']}"
            lines.append(f"| {row['name'].strip()} | {measured} | {target} | {met} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
