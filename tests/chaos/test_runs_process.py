"""Short runs against real nodes, from the command line to the timeline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

RUN_S_MAX = 110.0
COMMAND = [sys.executable, "-m", "agentmem_chaos.cli"]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=RUN_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        pytest.fail(f"the run did not end within {RUN_S_MAX:g} s:\n{said}")
    return process.returncode, said


def result_of(folder: Path) -> dict[str, Any]:
    (run,) = (folder / "chaos-runs").iterdir()
    assert (run / "timeline.html").stat().st_size > 10_000
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that still use the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder).encode() in environment and "agentmem_node" in line:
                found.append(line)
    return found


def everything_held(folder: Path, code: int, said: str) -> dict[str, Any]:
    assert code == 0, said
    result = result_of(folder)
    assert result["passed"]
    verdicts = {found["checker"]: found["verdict"] for found in result["findings"]}
    assert "violated" not in verdicts.values() and "unknown" not in verdicts.values()
    assert processes_of(folder) == []
    return result


def test_a_killed_leader_a_partition_and_lost_answers_break_no_claim(tmp_path: Path) -> None:
    process = started(tmp_path, "run", "smoke", "--seconds", "20", "--seed", "1")
    result = everything_held(tmp_path, *finished(process))
    assert {fault["nemesis"] for fault in result["faults"]} == {
        "kill-leader",
        "partition-one",
        "cut-after-send",
    }
    verdicts = {found["checker"]: found["verdict"] for found in result["findings"]}
    for checker in ("linearizable", "memories", "search", "exactly-once", "digests", "minority"):
        assert verdicts[checker] == "holds", checker
    assert result["figures"]["ok"] > 200
    assert result["refusals"] and all(r["took_s"] <= 2.0 for r in result["refusals"])
    assert result["figures"]["lost_leader_to_next_write_s"]["count"] > 0


def test_an_interrupted_run_ends_everything_and_still_reports(tmp_path: Path) -> None:
    process = started(tmp_path, "run", "register+pause-leader", "--seconds", "600", "--seed", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if "SIGSTOP" in line:
            break
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, said = finished(process)
    assert time.monotonic() - begun < 60.0
    result = everything_held(tmp_path, code, said)
    assert result["interrupted"]
    assert result["figures"]["ok"] > 0


def test_moves_and_splits_while_a_leader_dies_break_no_claim(tmp_path: Path) -> None:
    scenario = "mixed+move-and-kill+split-and-kill"
    process = started(tmp_path, "run", scenario, "--nodes", "4", "--seconds", "15", "--seed", "1")
    result = everything_held(tmp_path, *finished(process))
    for nemesis in ("move-and-kill", "split-and-kill"):
        struck = [fault for fault in result["faults"] if fault["nemesis"] == nemesis]
        assert struck and all("killed" in fault["what"] for fault in struck)


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_cuts_and_a_join_among_network_namespaces_break_no_claim(tmp_path: Path) -> None:
    arguments = ("--hosts", "namespaces", "--seconds", "20", "--seed", "2")
    scenario = "mixed+partition-one+join-node+kill-majority"
    process = started(tmp_path, "run", scenario, *arguments)
    code, said = finished(process)
    if code == 2:
        pytest.skip(f"namespaces cannot be made here: {said[-300:]}")
    result = everything_held(tmp_path, code, said)
    assert len(result["faults"]) >= 2
    struck = [fault["nemesis"] for fault in result["faults"]]
    assert len(result["nodes"]) == 3 + struck.count("join-node")
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "am-chaos" not in left.stdout
