"""Commits per second of our Raft beside etcd's, three processes on loopback each, in one run.

    python -m benchmarks.raft [--scale S] [--json FILE]

Ours: journal with an fdatasync per batch, mutual TLS between members, the load made inside the
leader's process. etcd: its own binary with default settings, no TLS, driven over gRPC through
connections that do nothing but put. Both write to the same disk, turns alternate, and the
median of the turns counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from agentmem_cluster.link import ca
from benchmarks import etcd
from benchmarks.raft_member import CLUSTER
from benchmarks.report import Row, benchmark_main
from benchmarks.servers import free_ports

NAMES = ("n1", "n2", "n3")
SIZE_BYTES = 1024
INFLIGHT = 64
TURNS = 5
TURN_S = 4.0
IDLE_GROUPS = 16


class Members:
    """Three member processes and a pipe to each."""

    def __init__(self, directory: Path, groups: int) -> None:
        self.processes: dict[str, subprocess.Popen[str]] = {}
        ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
        certificates = directory / "certificates"
        certificates.mkdir()
        ca.create_ca(certificates, CLUSTER)
        for name in NAMES:
            ca.issue(certificates, name)
            (directory / name).mkdir()
            config = {
                "name": name,
                "ports": ports,
                "data": str(directory / name),
                "certificates": str(certificates),
                "groups": groups,
            }
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.raft_member", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(directory / f"{name}.log").open("w"),
                text=True,
                bufsize=1,
            )

    def ask(self, name: str, **order: Any) -> Any:
        process = self.processes[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"member {name} ended with {process.wait()}")
        return json.loads(line)

    def wait_for_leaders(self, groups: int, seconds: float = 20.0) -> str:
        """The member that leads most, once every group has a leader that all know."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = {name: self.ask(name, do="status") for name in NAMES}
            led = sum(state["leading"] for state in states.values())
            if led == groups and all(state["known"] == groups for state in states.values()):
                return max(NAMES, key=lambda name: states[name]["leading"])
            time.sleep(0.05)
        raise RuntimeError(f"no leaders after {seconds} s")

    def cpu_s(self) -> list[float]:
        return [cpu_s(process.pid) for process in self.processes.values()]

    def stop(self) -> None:
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes.values():
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def members(groups: int) -> Iterator[Members]:
    directory = Path(tempfile.mkdtemp(prefix="agentmem-raft-"))
    started = Members(directory, groups)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(directory, ignore_errors=True)


def measure(scale: float, progress: Callable[[str], None]) -> list[Row]:
    turns = max(1, round(TURNS * scale))
    turn_s = TURN_S if scale >= 0.5 else 1.5
    rows = compare(turns, turn_s, progress)
    rows += idle(4.0 if scale >= 0.5 else 2.0, progress)
    return rows


def compare(turns: int, turn_s: float, progress: Callable[[str], None]) -> list[Row]:
    ours: dict[int, list[dict[str, Any]]] = {1: [], INFLIGHT: []}
    theirs: dict[int, list[dict[str, Any]]] = {1: [], INFLIGHT: []}
    reads: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(members(1))
        leader = group.wait_for_leaders(1)
        server = stack.enter_context(etcd.cluster()) if etcd.available() else None
        order = {"do": "load", "size": SIZE_BYTES}
        group.ask(leader, **order, inflight=INFLIGHT, seconds=1.0)  # warm
        if server is not None:
            etcd.load(server, SIZE_BYTES, INFLIGHT, 1.0)
        for turn in range(turns):
            progress(f"turn {turn + 1} of {turns}")
            for inflight in (1, INFLIGHT):
                # A turn of one second settles what one write at a time needs.
                seconds = turn_s if inflight > 1 else min(turn_s, 1.0)
                cpu = sum(group.cpu_s())
                figures = group.ask(leader, **order, inflight=inflight, seconds=seconds)
                figures["cpu_us"] = (sum(group.cpu_s()) - cpu) / (figures["rate"] * seconds) * 1e6
                ours[inflight].append(figures)
                if server is not None:
                    theirs[inflight].append(etcd.load(server, SIZE_BYTES, inflight, seconds))
            follower = next(name for name in NAMES if name != leader)
            reads.append(group.ask(follower, do="reads", inflight=INFLIGHT, seconds=0.5))
    return _rows(ours, theirs, reads)


def _rows(
    ours: dict[int, list[dict[str, Any]]],
    theirs: dict[int, list[dict[str, Any]]],
    reads: list[dict[str, Any]],
) -> list[Row]:
    def median(turns: list[dict[str, Any]], figure: str) -> float:
        return statistics.median(turn[figure] for turn in turns)

    rows = []
    for inflight in (INFLIGHT, 1):
        what = f"{SIZE_BYTES} B, {inflight} in flight"
        turns = {"ours": ours[inflight], "etcd": theirs[inflight]}
        rows.append(Row(f"commits, {what}", median(ours[inflight], "rate"), "/s", detail=turns))
        rows.append(Row(f"  p50, {what}", median(ours[inflight], "p50_ms"), "ms"))
        rows.append(Row(f"  p99, {what}", median(ours[inflight], "p99_ms"), "ms"))
        rows.append(Row(f"  CPU of all three, {what}", median(ours[inflight], "cpu_us"), "us/op"))
        if theirs[inflight]:
            rows.append(Row(f"etcd: commits, {what}", median(theirs[inflight], "rate"), "/s"))
            rows.append(Row(f"  p50, {what}", median(theirs[inflight], "p50_ms"), "ms"))
            rows.append(Row(f"  p99, {what}", median(theirs[inflight], "p99_ms"), "ms"))
            rows.append(
                Row(f"  CPU of all three, {what}", median(theirs[inflight], "cpu_us"), "us/op")
            )
            times = median(ours[inflight], "rate") / median(theirs[inflight], "rate")
            target = 1.5 if inflight == INFLIGHT else None
            rows.append(Row(f"our commits per etcd's, {what}", times, "x", target))
    rows.append(Row("linearizable reads on a follower, 64 waiting", median(reads, "rate"), "/s"))
    return rows


def idle(seconds: float, progress: Callable[[str], None]) -> list[Row]:
    """What sixteen groups cost that have nothing to do but keep their leaders."""
    progress(f"{IDLE_GROUPS} idle groups")
    with members(IDLE_GROUPS) as group:
        group.wait_for_leaders(IDLE_GROUPS)
        for name in NAMES:
            group.ask(name, do="spread")
        time.sleep(2.0)
        group.wait_for_leaders(IDLE_GROUPS)
        before = group.cpu_s()
        time.sleep(seconds)
        after = group.cpu_s()
    percents = [100 * (b - a) / seconds for a, b in zip(before, after, strict=True)]
    return [
        Row(
            f"{IDLE_GROUPS} idle groups, CPU of the busiest node",
            max(percents),
            "% of a core",
            5.0,
            lower_is_better=True,
            detail={"percents": percents},
        )
    ]


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    benchmark_main("Raft: ours beside etcd", measure)
