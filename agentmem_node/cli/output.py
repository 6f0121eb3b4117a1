"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import agentmem_client as client


def wants_json(as_json: bool) -> bool:
    """JSON when asked for, and whenever no person looks."""
    return as_json or not sys.stdout.isatty()


def to_plain(value: Any) -> Any:
    """Results as JSON types; of an error its code and text."""
    if isinstance(value, client.AgentMemError):
        return {"code": value.code, "detail": value.message}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that the terminal's or the pipe's encoding can carry."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(to_plain(value), ensure_ascii=not is_unicode, indent=indent)


def print_json(value: Any) -> None:
    """One document: indented for a person who asked for it, on one line for a pipe."""
    click.echo(json_text(value, indent=2 if sys.stdout.isatty() else None))


def console() -> Console:
    return Console(highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], **options: Any) -> Table:
    """Columns are headings; one that begins with `>` is aligned right, with `*` never wrapped."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, **options)
    for heading in columns:
        name = heading.lstrip(">*")
        made.add_column(
            name,
            justify="right" if ">" in heading[:2] else "left",
            no_wrap="*" in heading[:2],
            overflow="fold",
        )
    for row in rows:
        # Text is never read as markup: a memory may hold [brackets].
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def scope_text(memory: client.Memory) -> str:
    """`user ana, run r1`."""
    pairs = (
        ("user", memory.user_id),
        ("agent", memory.agent_id),
        ("app", memory.app_id),
        ("run", memory.run_id),
    )
    return ", ".join(f"{kind} {value}" for kind, value in pairs if value is not None)


def day(when: str | None) -> str:
    """`2026-01-31 09:30` of an RFC 3339 time."""
    return (when or "")[:16].replace("T", " ")


def memories_table(memories: Iterable[client.Memory]) -> Table:
    return table(
        ("*id", "memory", "of", "*created"),
        ((m.id, m.content, scope_text(m), day(m.created_at)) for m in memories),
    )


def found_table(found: Iterable[client.Found]) -> Table:
    return table(
        (">*score", "memory", "of", "*created", "*id"),
        ((f"{f.score:.3f}", f.content, scope_text(f), day(f.created_at), f.id) for f in found),
    )


def memory_card(memory: client.Memory) -> Table:
    """Every field of one memory, one a line."""
    card = Table(box=None, show_header=False, pad_edge=False)
    card.add_column(style="bold", no_wrap=True)
    card.add_column(overflow="fold")
    fields = to_plain(memory)
    for name, value in fields.items():
        if value not in (None, "", [], {}):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            card.add_row(name, Text(shown))
    return card
