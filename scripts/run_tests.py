"""Run every test in stages, each with a deadline of its own, and fail when none ran: `make test`.

Stages keep a hanging node from eating the whole budget, and the quick ones fail first. Worker
processes belong to a process group that is ended by its id when a stage overruns.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

# (name, deadline in seconds, pytest arguments). Areas are disjoint; `check_complete` keeps them so.
STAGES: list[tuple[str, int, list[str]]] = [
    (
        "unit",
        600,
        [
            "tests",
            "-m",
            "not process and not model",
            "--ignore=tests/sim",
            "--ignore=tests/defects",
            "--ignore=tests/epochs",
            # They share nothing: two at a time halve the wait on the smallest machine there is.
            *("-n", "2"),
        ],
    ),
    # Whole nodes, several in one process: one such test at a time, for they have deadlines.
    ("clusters", 400, ["tests/epochs", "-m", "not process and not model"]),
    ("defects", 240, ["tests/defects"]),
    ("simulator", 1_200, ["tests/sim"]),
    ("model", 240, ["tests", "-m", "model and not process"]),
    ("processes", 900, ["tests", "-m", "process"]),
]
NO_TESTS_COLLECTED = 5


def run_stage(name: str, seconds: int, arguments: list[str]) -> tuple[int, dict[str, int]]:
    """(exit code, counts by outcome) of one stage. Exit code 124: it overran."""
    print(f"\n=== {name} (at most {seconds} s)", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    watchdog = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import time, os; time.sleep({seconds}); os.killpg({process.pid}, {signal.SIGKILL:d})",
        ]
    )
    last = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if re.search(r"\d+ (passed|failed|error|skipped)", line):
                last = line
        code = process.wait()
    finally:
        watchdog.kill()
        watchdog.wait()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the usual case: nothing was left behind
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
    }
    if time.monotonic() >= deadline:
        print(f"=== {name} did not end within {seconds} s and was stopped", flush=True)
        return 124, counts
    return code, counts


def main() -> int:
    os.chdir(Path(__file__).resolve().parent.parent)
    only = set(sys.argv[1:])
    total: dict[str, int] = {}
    failed: list[str] = []
    for name, seconds, arguments in STAGES:
        if only and name not in only:
            continue
        started = time.monotonic()
        code, counts = run_stage(name, seconds, arguments)
        for word, n in counts.items():
            total[word] = total.get(word, 0) + n
        print(f"=== {name}: {time.monotonic() - started:.0f} s", flush=True)
        if code != 0:
            failed.append(
                f"{name} (exit {code}{', no test ran' if code == NO_TESTS_COLLECTED else ''})"
            )
    passed, bad = (
        total.get("passed", 0),
        total.get("failed", 0) + total.get("error", 0) + total.get("errors", 0),
    )
    if failed:
        print("\nFailed: " + ", ".join(failed))
    print(f"\n{passed} passed, {bad} failed, {total.get('skipped', 0)} skipped")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
