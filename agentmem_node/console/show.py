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
from agentmem_node.cli.output import table
from agentmem_node.cli.status import ClusterState, render, render_plain

_LOG_COLUMNS = 120

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

    def status(self, state: ClusterState, *, short: bool = False) -> None:
        self.console.print(render_plain(state) if short else render(state))
