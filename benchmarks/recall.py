"""Does a search find the turn that holds the answer?

    python benchmarks/recall.py DATA.json [--legs] [--url URL] [--json [FILE]]

Loads conversations through the HTTP API, one memory a turn (owner = conversation, run = session),
asks every question with default settings, and counts the evidence turns among the results. What
recall@k and MRR mean here is in `recall_score.py`, the form of the file in `conversations.py`.
Without --url it starts a node of its own and leaves nothing behind; with it, it deletes what it
added. The data is CC BY-NC: for evaluation only, never part of this project.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

if __package__ in (None, ""):  # run as a file: the folder above holds the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agentmem_client import AgentMemError, AsyncClient
from benchmarks import servers
from benchmarks.conversations import CATEGORIES, Conversation, WrongForm, read
from benchmarks.recall_score import CUTS, Score, mean, score

DEFAULT = "default"
LEGS = ("bm25", "vector", "phrase", "fuzzy")
RECALL_AT_10_FLOOR = 0.78
MRR_FLOOR = 0.56

_DEPTH = 100  # results asked for: MRR needs more than the largest cut
_BATCH = 100
_IN_FLIGHT = 8
_LOAD_DEADLINE_S = 300.0
_ASK_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One question's outcome with one choice of legs."""

    setting: str
    conversation: str
    category: int
    score: Score


class Bench:
    """One node, loaded with the conversations under owners of their own."""

    def __init__(self, client: AsyncClient, progress: Progress, *, runs: bool = True) -> None:
        self._client = client
        self._progress = progress
        self._runs = runs
        self._mark = secrets.token_hex(4)  # so that two runs on one node never mix
        self._position: dict[str, int] = {}  # of each memory id in its conversation
        self._semaphore = asyncio.Semaphore(_IN_FLIGHT)

    def owner(self, conversation: Conversation) -> str:
        return f"recall-{self._mark}-{conversation.name}"

    async def load(self, conversations: Sequence[Conversation]) -> None:
        total = sum(len(c.turns) for c in conversations)
        bar = self._progress.add_task("loading turns", total=total)
        for conversation in conversations:
            memories = [
                {
                    "content": turn.content,
                    "created_at": turn.created_at,
                    **({"run_id": turn.session} if self._runs else {}),
                }
                for turn in conversation.turns
            ]
            added = await self._client.add_many(
                memories,
                batch_size=_BATCH,
                progress=_Advance(self._progress, bar, len(self._position)),
                user_id=self.owner(conversation),
                deadline_s=_LOAD_DEADLINE_S,
            )
            for position, item in enumerate(added):
                if item.error is not None or item.id is None:
                    raise SystemExit(f"turn {position} of {conversation.name}: {item.error}")
                self._position[item.id] = position

    async def ask(
        self, conversations: Sequence[Conversation], setting: str, options: dict[str, Any]
    ) -> list[Asked]:
        total = sum(len(c.questions) for c in conversations)
        bar = self._progress.add_task(f"asking ({setting})", total=total)

        async def one(conversation: Conversation, number: int) -> Asked:
            question = conversation.questions[number]
            async with self._semaphore:
                found = await self._client.search(
                    question.text,
                    user_id=self.owner(conversation),
                    top_k=_DEPTH,
                    deadline_s=_ASK_DEADLINE_S,
                    **options,
                )
            self._progress.advance(bar)
            ranked = [self._position[hit.id] for hit in found]
            return Asked(
                setting, conversation.name, question.category, score(ranked, question.evidence)
            )

        return await asyncio.gather(
            *(one(c, number) for c in conversations for number in range(len(c.questions)))
        )

    async def clean(self) -> None:
        """Delete everything that `load` added."""
        await self._client.delete_many(list(self._position), deadline_s=_LOAD_DEADLINE_S)


class _Advance:
    """Moves a bar that other conversations have already brought to `before`."""

    def __init__(self, progress: Progress, bar: TaskID, before: int) -> None:
        self._progress, self._bar, self._before = progress, bar, before

    def __call__(self, done: int, _part: object) -> None:
        self._progress.update(self._bar, completed=self._before + done)


async def measure(
    url: str, key: str | None, conversations: Sequence[Conversation], arguments: argparse.Namespace
) -> list[Asked]:
    settings: dict[str, dict[str, Any]] = {DEFAULT: {}}
    if arguments.legs:
        settings |= {leg: {"legs": [leg]} for leg in LEGS}
        settings["rrf"] = {"fusion": "rrf"}
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
    asked: list[Asked] = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        async with AsyncClient(url, api_key=key) as client:
            bench = Bench(client, progress, runs=not arguments.without_runs)
            try:
                await bench.load(conversations)
                for setting, options in settings.items():
                    asked += await bench.ask(conversations, setting, options)
            finally:
                if arguments.url is not None:
                    await bench.clean()
    return asked


def rows_of(asked: Sequence[Asked]) -> Iterator[tuple[str, str, Score]]:
    """(setting, of what, mean) for every setting, category and conversation."""
    for setting in dict.fromkeys(a.setting for a in asked):
        mine = [a for a in asked if a.setting == setting]
        yield setting, "all questions", mean(a.score for a in mine)
        for category in sorted({a.category for a in mine}):
            name = CATEGORIES.get(category, f"category {category}")
            yield setting, name, mean(a.score for a in mine if a.category == category)
        for conversation in dict.fromkeys(a.conversation for a in mine):
            part = mean(a.score for a in mine if a.conversation == conversation)
            yield setting, conversation, part


def table_of(rows: Sequence[tuple[str, str, Score]]) -> Table:
    table = Table(title="Recall of the turns that hold the answer", title_justify="left")
    for name in ("legs", "questions", *(f"R@{k}" for k in CUTS), "MRR", "n"):
        table.add_column(name, justify="left" if name in ("legs", "questions") else "right")
    for setting, what, s in rows:
        first = what == "all questions"
        if first and table.row_count:
            table.add_section()
        cells = [f"{value:.3f}" for value in (*s.recall, s.reciprocal_rank)]
        style = "bold" if first else None
        table.add_row(setting if first else "", what, *cells, str(s.questions), style=style)
    return table


def verdict(rows: Sequence[tuple[str, str, Score]]) -> bool:
    """Whether the default settings reach the floors."""
    best = next(s for setting, what, s in rows if (setting, what) == (DEFAULT, "all questions"))
    at_10 = best.recall[CUTS.index(10)]
    return at_10 >= RECALL_AT_10_FLOOR and best.reciprocal_rank >= MRR_FLOOR


def document_of(
    rows: Sequence[tuple[str, str, Score]], arguments: argparse.Namespace
) -> dict[str, Any]:
    return {
        "data": arguments.data.name,
        "runs": not arguments.without_runs,
        "floors": {"recall@10": RECALL_AT_10_FLOOR, "mrr": MRR_FLOOR},
        "floors_met": verdict(rows),
        "rows": [{"legs": setting, "of": what, **s.as_dict()} for setting, what, s in rows],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Retrieval quality on conversations.")
    parser.add_argument("data", type=Path, help="a file in the form of LoCoMo (CC BY-NC)")
    parser.add_argument("--url", help="ask this node (default: start one)")
    parser.add_argument("--legs", action="store_true", help="also each leg alone, and RRF")
    parser.add_argument(
        "--without-runs", action="store_true", help="load the turns without run_id: no neighbours"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or to standard output",
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a floor is missed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    errors = Console(stderr=True)
    try:
        conversations = read(arguments.data)
    except WrongForm as error:
        errors.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    key = os.environ.get("AGENTMEM_API_KEY")
    with contextlib.ExitStack() as stack:
        url = arguments.url
        if url is None:
            errors.print("[dim]starting a node ...[/]")
            url = stack.enter_context(servers.agentmem_node(provider="minilm")).url()
        try:
            asked = asyncio.run(measure(url, key, conversations, arguments))
        except AgentMemError as error:
            errors.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
            return 3
    rows = list(rows_of(asked))
    if arguments.json == "-":
        print(json.dumps(document_of(rows, arguments), indent=1))
    else:
        Console().print(table_of(rows))
        if arguments.json is not None:
            Path(arguments.json).write_text(
                json.dumps(document_of(rows, arguments), indent=1) + "\n"
            )
    met = verdict(rows)
    errors.print(
        f"floors (R@10 >= {RECALL_AT_10_FLOOR}, MRR >= {MRR_FLOOR}): "
        + ("[green]met[/]" if met else "[red]MISSED[/]")
    )
    return 1 if arguments.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
