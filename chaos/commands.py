"""agentmem-chaos run, list, report: real nodes, real faults."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agentmem_chaos.checkers.base import Verdict
from agentmem_chaos.checkers.registry import CLAIMS
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.registry import HOSTS, make_hosts
from agentmem_chaos.nemeses.registry import NEMESES
from agentmem_chaos.report.page import write_page
from agentmem_chaos.runs.result import FOLDER, TIMELINE, RunResult, find_run, load, save
from agentmem_chaos.runs.runner import Run
from agentmem_chaos.runs.scenario import NAMED, Scenario, find
from agentmem_chaos.workloads.registry import WORKLOADS

EXIT_VIOLATION = 1
EXIT_COULD_NOT = 2
EXIT_INTERRUPTED = 130
CLIENTS_DEFAULT = 8
SECONDS_DEFAULT = 60.0
_REDRAW_S = 0.25
_NAME_CHARS_MAX = 80
_STYLES = {
    Verdict.HOLDS.value: "green",
    Verdict.VIOLATED.value: "bold red",
    Verdict.UNKNOWN.value: "yellow",
    Verdict.NOTHING.value: "dim",
}


@click.command()
@click.argument("scenario")
@click.option(
    "--seconds",
    type=click.FloatRange(5.0, 86_400.0),
    default=SECONDS_DEFAULT,
    show_default=True,
    help="How long faults strike.",
)
@click.option("--seed", type=int, help="Repeat the plan of this seed. [default: a new one]")
@click.option(
    "--hosts",
    "kind",
    type=click.Choice(sorted(HOSTS)),
    default="loopback",
    show_default=True,
    help="Where the nodes live.",
)
@click.option("--nodes", type=click.IntRange(1, 9), help="[default: the scenario's, mostly 3]")
@click.option("--clients", type=click.IntRange(1, 64), default=CLIENTS_DEFAULT, show_default=True)
@click.option("--keep-data", is_flag=True, help="Keep the nodes' data directories of a good run.")
def run(
    scenario: str,
    seconds: float,
    seed: int | None,
    kind: str,
    nodes: int | None,
    clients: int,
    keep_data: bool,
) -> None:
    """Run a SCENARIO against real node processes and check what clients saw.

    SCENARIO is a name that `agentmem-chaos list` shows, or WORKLOAD+NEMESIS+NEMESIS.
    Ctrl-C ends the faults; what was seen until then is checked and reported.
    Exit code 1: a claim is violated, or could not be checked; 2: the run could not take place.
    """
    console = Console(highlight=False)
    try:
        chosen = find(scenario)
        seed = random.SystemRandom().randrange(1, 1_000_000) if seed is None else seed
        count = nodes or chosen.nodes
        now = datetime.datetime.now(datetime.UTC)
        folder = _folder(chosen, seed, now)
        command = (
            f"agentmem-chaos run {chosen.name} --seconds {seconds:g} --seed {seed} "
            f"--hosts {kind} --nodes {count} --clients {clients}"
        )
        hosts = make_hosts(kind, folder / "nodes", count)
        result = RunResult(
            scenario=chosen.name,
            workload=chosen.workload,
            nemeses=chosen.nemeses,
            hosts=kind,
            nodes=hosts.nodes,
            clients=clients,
            seed=seed,
            seconds=seconds,
            command=command,
            started_at=now.isoformat(timespec="seconds"),
        )
        played = asyncio.run(
            _play(console, lambda tell: Run(chosen, hosts, seconds, seed, clients, result, tell))
        )
    except ChaosError as error:
        console.print(Text(f"error: {error}", style="red"))
        sys.exit(EXIT_COULD_NOT)
    except KeyboardInterrupt:
        console.print("interrupted: everything was ended, nothing was checked")
        sys.exit(EXIT_INTERRUPTED)
    save(played, folder)
    write_page(folder)
    if played.passed and not keep_data:
        discard = getattr(hosts, "discard_data", None)
        if discard is not None:
            discard()
    _show(console, load(folder), folder)
    sys.exit(0 if played.passed else EXIT_VIOLATION)


def _folder(scenario: Scenario, seed: int, now: datetime.datetime) -> Path:
    # A scenario that was put together may have a longer name than a file may.
    name = f"{scenario.name[:_NAME_CHARS_MAX]}-{seed}-{now:%Y%m%dT%H%M%S}"
    folder = (FOLDER / name).absolute()
    folder.mkdir(parents=True)
    return folder


async def _play(console: Console, make: Any) -> RunResult:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[ops]:,} operations"),
        TextColumn("{task.fields[faults]} faults"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task("starting", total=None, ops=0, faults=0)

        def tell(line: str) -> None:
            history = running.history
            at = "" if history is None else f"{history.now_s():7.1f} s  "
            console.print(Text(f"{at}{line}"))
            bar.update(task, description=line.partition(":")[0])

        running: Run = make(tell)
        playing = asyncio.create_task(running.play())
        restore = _on_interrupt(running, playing, console)
        try:
            while not playing.done():
                await asyncio.wait({playing}, timeout=_REDRAW_S)
                if running.history is not None and running.striker is not None:
                    bar.update(
                        task,
                        total=running.seconds,
                        completed=min(running.seconds, running.history.now_s()),
                        ops=len(running.history.ops),
                        faults=len(running.striker.struck),
                    )
            try:
                return playing.result()
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
        finally:
            restore()


def _on_interrupt(running: Run, playing: asyncio.Task[RunResult], console: Console) -> Any:
    """The first signal ends the faults, the second the run."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        if running.ending.is_set() or running.history is None:
            playing.cancel()
        else:
            console.print("ending early: what was seen is checked; once more to end at once")
            running.ending.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, interrupted)

    def restore() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    return restore


@click.command(name="list")
def list_() -> None:
    """List scenarios, workloads, nemeses, hosts and checkers."""
    console = Console(highlight=False)
    table = _table("scenario", "workload", "nemeses", "what")
    for scenario in NAMED.values():
        table.add_row(
            scenario.name, scenario.workload, " ".join(scenario.nemeses), scenario.description
        )
    console.print(table)
    table = _table("workload", "what")
    for name, workload in WORKLOADS.items():
        table.add_row(name, workload.description)
    console.print(table)
    table = _table("nemesis", "what", "needs")
    for name, nemesis in NEMESES.items():
        needs = ", ".join(sorted(need.value for need in nemesis.needs))
        table.add_row(name, nemesis.description, needs)
    console.print(table)
    table = _table("hosts", "what")
    for name, described in HOSTS.items():
        table.add_row(name, described.description)
    console.print(table)
    table = _table("checker", "claim")
    for name, claim in CLAIMS.items():
        table.add_row(name, claim)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    return table


@click.command()
@click.argument("name", required=False, metavar="[RUN]")
@click.option("--open", "open_page", is_flag=True, help="Open the timeline in a browser.")
def report(name: str | None, open_page: bool) -> None:
    """Show the result of a RUN, by default of the latest."""
    console = Console(highlight=False)
    try:
        folder = find_run(name)
        document = load(folder)
        write_page(folder)
    except ChaosError as error:
        console.print(Text(f"error: {error}", style="red"))
        sys.exit(EXIT_COULD_NOT)
    _show(console, document, folder)
    if open_page:
        click.launch((folder / TIMELINE).absolute().as_uri())
    sys.exit(0 if document["passed"] else EXIT_VIOLATION)


def _show(console: Console, document: dict[str, Any], folder: Path) -> None:
    table = _table("checker", "verdict", "of", "claim")
    for found in document["findings"]:
        verdict = Text(found["verdict"], style=_STYLES.get(found["verdict"], ""))
        table.add_row(found["checker"], verdict, f"{found['looked_at']:,}", found["claim"])
    console.print(table)
    for found in document["findings"]:
        for detail in found["details"]:
            console.print(Text(f"{found['checker']}: {detail}", style="red"))
    for fault in document["faults"]:
        if fault["failed"]:
            console.print(Text(f"{fault['nemesis']} failed: {fault['failed']}", style="red"))
    figures = document["figures"]
    console.print(
        f"{figures['operations']:,} operations ({figures['ok']:,} ok, {figures['failed']:,} "
        f"refused, {figures['unknown']:,} unknown), {figures['faults']} faults"
        + (", ended early" if document["interrupted"] else "")
    )
    for name, label in (
        ("latency_s", "latency"),
        ("lost_leader_to_next_write_s", "leader lost to next write"),
        ("healed_to_ready_s", "healed to ready"),
    ):
        spread = figures[name]
        if spread["count"]:
            console.print(
                f"{label}: p50 {spread['p50']:.3f} s, p99 {spread['p99']:.3f} s, "
                f"max {spread['max']:.3f} s ({spread['count']})"
            )
    console.print(Text(f"timeline: {_relative(folder / TIMELINE)}"))
    console.print(Text(f"again: {document['command']}", style="bold"))


def _relative(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return os.fspath(path.relative_to(Path.cwd()))
    return os.fspath(path)
