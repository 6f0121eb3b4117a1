"""How the demo looks: bars and tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.rule import Rule
from rich.text import Text

import agentmem_client as client
from agentmem_node.cli.devlayout import NodeFiles
from agentmem_node.cli.output import table
from agentmem_node.cli.plan_view import size_text
from agentmem_node.cli.status import ClusterState, render, render_plain
from agentmem_node.console.cutting import REFUSED, Partition
from agentmem_node.console.growing import Change
from agentmem_node.model import operations as ops

_LOG_COLUMNS = 120
_REASONS_MAX = 3

Step = Callable[[int, int], None]
"""Called with (done, all)."""


class Show:
    """Prints to stdout."""

    def __init__(self, console: Console | None = None) -> None:
        # A log has no width of its own: wide enough for a memory on a line or two.
        width = None if sys.stdout.isatty() else _LOG_COLUMNS
        self.console = console or Console(highlight=False, width=width)
        self.is_live = self.console.is_terminal

    def say(self, text: str = "", style: str = "") -> None:
        self.console.print(Text(text, style=style))

    def scene(self, title: str) -> None:
        self.say()
        if self.is_live:
            self.console.print(Rule(Text(title, style="bold"), align="left"))
        else:
            self.say(f"== {title}")

    def good(self, text: str) -> None:
        self.say(f"  ok  {text}", "green")

    def bad(self, text: str) -> None:
        self.say(f"  !!  {text}", "red bold")

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "") -> Iterator[Step]:
        """A progress bar that ends as one line with the time it took."""
        begun = time.monotonic()
        done_last = 0
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self.console,
            disable=not self.is_live,
            transient=True,
        ) as progress:
            task = progress.add_task(title, total=total)

            def step(done: int, whole: int) -> None:
                nonlocal done_last
                done_last = done
                progress.update(task, completed=done, total=whole)

            yield step
        self.good(f"{title}: {done_last}{unit} in {time.monotonic() - begun:.1f} s")

    def answer(self, query: str, user: str | None, found: client.SearchResult) -> None:
        whose = f" ({user})" if user else ""
        self.say(f"  search: {query}{whose}", "bold")
        if not found.results:
            self.say("    nothing found")
            return
        rows = [
            (f"    {hit.score:.2f}", hit.user_id or "", hit.created_at[:10], hit.content)
            for hit in found
        ]
        self.console.print(table(("*score", "*who", "*when", "memory"), rows, show_header=False))
        if found.partial:
            self.bad(f"without shards {', '.join(found.partial)}, which did not answer")

    def refused(self, reasons: list[str]) -> None:
        """Some of the writes that were not acknowledged, and why."""
        for reason in reasons[:_REASONS_MAX]:
            self.say(f"      one was not acknowledged: {reason}")

    # -- a cluster that changes -------------------------------------------------------------

    def partition(self, seen: Partition) -> None:
        """What a node that is cut off says, and what the others do."""
        self.good(f"{seen.node} runs, and no other node reaches it")
        for refusal in seen.refusals:
            self.good(
                f"asked itself, it refuses {refusal.what} within {refusal.waited_s:.1f} s, the "
                f"first time {refusal.after_s:.1f} s after the cut ({refusal.code})"
            )
        if len(seen.refusals) < len(REFUSED):
            self.bad(f"{seen.node} did not refuse {' and '.join(REFUSED)}")
        if seen.first_write_s is None:
            self.bad("the others acknowledged no write after the cut")
        else:
            self.good(
                f"the others acknowledged a write {seen.first_write_s:.2f} s after the cut, and "
                f"{seen.acknowledged} around it"
            )
        self.refused(seen.refused)

    def healed(self, node: str, took_s: float | None) -> None:
        if took_s is None:
            self.bad(f"the links of {node} are whole, but not all replicas are alike yet: `status`")
        else:
            self.good(
                f"healed: {took_s:.1f} s later all replicas of every shard have the same digest"
            )

    def joined(self, node: NodeFiles, pid: int, took_s: float) -> None:
        self.say(f"      {node.id}  {node.url}  pid {pid}")
        self.good(f"{node.id} joined with a token and was ready after {took_s:.1f} s")

    def moved(self, step: ops.StepProgress, took_s: float) -> None:
        """One shard of an operation has changed hands, or could not."""
        members = f"{' '.join(step.from_members)} -> {' '.join(step.to_members)}"
        if step.state == "failed":
            self.bad(f"{step.shard} stays with {' '.join(step.from_members)}: {step.error}")
        else:
            self.say(f"      {step.shard}  {members}  {size_text(step.done_bytes)}, {took_s:.1f} s")

    def changed(self, what: str, change: Change) -> None:
        """How an operation ended, and what those who wrote noticed."""
        if change.operation is None:
            self.good("no shard has to move: it is even already")
            return
        if not change.is_done:
            self.bad(f"it did not end as wished: {change.why}")
            return
        self.good(
            f"{what}: {change.moved} moved in {change.took_s:.1f} s; of {change.acknowledged} "
            f"writes meanwhile the longest took {change.longest_write_s:.2f} s"
        )
        self.refused(change.refused)

    def status(self, state: ClusterState, *, short: bool = False) -> None:
        self.console.print(render_plain(state) if short else render(state))
