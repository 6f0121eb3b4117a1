"""agentmem-chaos: simulated worlds (`sim`), and faults that strike real nodes (`run`)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agentmem_chaos.commands import list_, run
from agentmem_chaos.commands import report as report_command
from agentmem_chaos.sim.plan import CALM_S_MIN, SECONDS_DEFAULT
from agentmem_chaos.sim.runner import Order, Outcome, play, play_all, rotating_seed, seeds
from agentmem_chaos.sim.story import Line

LINES_AROUND_A_VIOLATION = 40
EXIT_VIOLATION = 1


@click.group()
@click.version_option(package_name="agentmem-cluster")
def main() -> None:
    """Break AgentMem on purpose, in ways that can be repeated."""


main.add_command(run)
main.add_command(list_)
main.add_command(report_command)


@main.command()
@click.option("--seed", type=int, help="Play this world, or begin with it when --worlds is given.")
@click.option(
    "--worlds", type=click.IntRange(1), help="How many worlds. [default: 1 with --seed, else 200]"
)
@click.option(
    "--nodes", type=click.IntRange(1, 9), help="Nodes in each world. [default: 3 or 5, by seed]"
)
@click.option(
    "--seconds",
    type=click.FloatRange(CALM_S_MIN + 1.0),
    help=f"Virtual seconds of each world. [default: {SECONDS_DEFAULT:g}]",
)
@click.option("--story", is_flag=True, help="Tell what happened, line by line (one world).")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per world, on stdout.")
def sim(
    seed: int | None,
    worlds: int | None,
    nodes: int | None,
    seconds: float | None,
    story: bool,
    jobs: int,
    as_json: bool,
) -> None:
    """Play simulated worlds: real Raft and journal, virtual time, network and disks.

    A world is a function of its seed. Faults come first; then everything is healed and the
    cluster must converge. Exit code 1 means that an invariant was violated; the command that
    plays that world again is printed.
    """
    if seed is not None:
        count = worlds or 1
        chosen = list(range(seed, seed + count))
        begun = f"seeds {seed} to {seed + count - 1}" if count > 1 else f"seed {seed}"
    else:
        count = worlds or 200
        rotating = rotating_seed()
        chosen = seeds(count, rotating)
        begun = f"fixed seeds from 1, rotating seeds from {rotating}"
    if story and count > 1:
        raise click.UsageError("--story tells one world: give --seed without --worlds")
    console = Console(stderr=as_json, highlight=False)
    orders = [Order(s, nodes, seconds, story) for s in chosen]
    played = iter([play(orders[0])]) if count == 1 else play_all(orders, jobs=jobs)
    if as_json:
        played = printed_as_json(played)
    if count == 1:
        outcomes = list(played)
        if story and not as_json:
            tell(console, outcomes[0].result.lines)
    else:
        console.print(f"{count} worlds, {begun}")
        outcomes = with_progress(console, played, count)
    console.print(summary(outcomes))
    failed = [outcome for outcome in outcomes if not outcome.result.passed]
    for outcome in failed:
        report(console, outcome, told=story)
    sys.exit(EXIT_VIOLATION if failed else 0)


@main.command()
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--only", default="", help="Plants whose protection or bug contains this text.")
def prove(jobs: int, only: str) -> None:
    """Take each protection away, in the simulator only, and count worlds until it is missed.

    Exit code 1 means that the harness did not find one within its bound, or not by its rule.
    """
    from agentmem_chaos.sim.planted import PLANTS
    from agentmem_chaos.sim.proving import find_all

    chosen = [at for at, plant in enumerate(PLANTS) if only in f"{plant.protection} {plant.bug}"]
    if not chosen:
        raise click.UsageError(f"no plant is named {only!r}")
    console = Console(highlight=False)
    table = Table("protection", "what is planted", "worlds", "found by", "s", box=None)
    missed = 0
    for at, found in find_all(chosen, jobs=jobs):
        plant = PLANTS[at]
        by_rule = bool(found.rules & plant.rules)
        missed += not by_rule
        console.print(Text(f"{plant.bug}: {found.first or 'not found'}", style="dim"))
        table.add_row(
            plant.protection,
            plant.bug,
            f"{found.worlds} of {plant.worlds_max}",
            Text(", ".join(sorted(found.rules)) or "nothing", style="" if by_rule else "red"),
            f"{found.seconds:.1f}",
        )
    console.print(table)
    console.print(f"{len(chosen) - missed} of {len(chosen)} found")
    sys.exit(EXIT_VIOLATION if missed else 0)


def printed_as_json(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """A line on stdout for each world as it ends, so that a long run can be watched."""
    for outcome in outcomes:
        click.echo(json.dumps(as_object(outcome)))
        yield outcome


def with_progress(console: Console, outcomes: Iterable[Outcome], count: int) -> list[Outcome]:
    done: list[Outcome] = []
    violated = 0
    bar = Progress(
        TextColumn("worlds"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[violated]} violated"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("worlds", total=count, violated=0)
        for outcome in outcomes:
            done.append(outcome)
            if not outcome.result.passed:
                violated += 1
                first = outcome.result.violations[0].splitlines()[0]
                bar.console.print(Text(f"seed {outcome.order.seed}: {first}", style="red"))
            bar.update(task, advance=1, violated=violated)
    return sorted(done, key=lambda outcome: outcome.order.seed)


def summary(outcomes: list[Outcome]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    virtual_s = sum(outcome.result.seconds for outcome in outcomes)
    cpu_s = sum(outcome.cpu_s for outcome in outcomes)
    sizes = sorted({outcome.result.nodes for outcome in outcomes})
    of_size = ", ".join(f"{sum(o.result.nodes == n for o in outcomes)} of {n}" for n in sizes)
    moving = sum(outcome.result.has_moves for outcome in outcomes)
    moves = sum(outcome.result.moves for outcome in outcomes)
    splits = sum(outcome.result.splits for outcome in outcomes)
    rewinds = sum(outcome.result.rewinds for outcome in outcomes)
    speed = virtual_s / max(cpu_s, 1e-9)
    shards = sum(outcome.result.engine == "shard" for outcome in outcomes)
    core = sum(outcome.result.core_clients for outcome in outcomes)
    rows = {
        "worlds": f"{len(outcomes)} ({of_size} nodes)",
        "virtual time": f"{virtual_s / 3600:,.2f} hours ({speed:.0f} times real time on a core)",
        "engines": f"{shards} with real shards, {core} called through the client library's core",
        "operations": f"{sum(outcome.result.calls for outcome in outcomes):,}",
        "acknowledged writes": f"{sum(outcome.result.acknowledged for outcome in outcomes):,}",
        "linearizable reads": f"{sum(outcome.result.reads for outcome in outcomes):,}",
        "faults": f"{sum(outcome.result.faults for outcome in outcomes):,}",
        "elections": f"{sum(outcome.result.elections for outcome in outcomes):,}",
        "moves": f"{moves:,} in {moving} worlds, {splits:,} splits and {rewinds:,} rewinds "
        f"among them; writes paused {pauses(outcomes)}",
        "violations": f"{sum(not outcome.result.passed for outcome in outcomes)} worlds",
    }
    if len(outcomes) == 1:
        rows["trace"] = outcomes[0].result.trace_hash
    for name, value in rows.items():
        bad = name == "violations" and not value.startswith("0 ")
        table.add_row(name, Text(value, style="red" if bad else ""))
    return table


def pauses(outcomes: list[Outcome]) -> str:
    """For how long a shard took no writes when its epoch changed, in virtual time."""
    found = sorted(pause for outcome in outcomes for pause in outcome.result.pauses_s)
    if not found:
        return "never"
    middle, late = (found[min(len(found) - 1, int(len(found) * q))] for q in (0.5, 0.99))
    return f"{middle:.2f} s in the middle, {late:.2f} s at the 99th percentile, faults included"


def report(console: Console, outcome: Outcome, *, told: bool) -> None:
    console.rule(f"[red]seed {outcome.order.seed} is violated")
    if not told:
        again = play(dataclasses.replace(outcome.order, story=True))
        tell(console, again.result.lines[-LINES_AROUND_A_VIOLATION:])
    for violation in outcome.result.violations:
        console.print(Text(violation, style="red"))
    console.print(Text(f"play it again: {outcome.order.command}", style="bold"))


def tell(console: Console, lines: list[Line]) -> None:
    for line in lines:
        style = "dim"
        if line.what.startswith("VIOLATION"):
            style = "bold red"
        elif line.what.startswith("FAULT"):
            style = "yellow"
        elif " is leader of " in f" {line.what}":
            style = "green"
        elif not line.who.startswith("client"):
            style = ""
        console.print(Text(str(line), style=style))


def as_object(outcome: Outcome) -> dict[str, object]:
    fields = dataclasses.asdict(outcome.result)
    fields["lines"] = [str(line) for line in outcome.result.lines]
    return {
        **fields,
        "passed": outcome.result.passed,
        "replay": outcome.order.command,
        "cpu_s": round(outcome.cpu_s, 3),
    }


if __name__ == "__main__":
    main()
