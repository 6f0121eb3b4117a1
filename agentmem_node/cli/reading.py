"""`agentmem search`, `list`, `get` and `history`."""

from __future__ import annotations

import itertools
from typing import Any

import click
from rich.table import Table

import agentmem_client as client
from agentmem_node.cli.connect import connection_options, open_client, scope_of, scope_options
from agentmem_node.cli.exits import Exit
from agentmem_node.cli.fields import F, json_object
from agentmem_node.cli.output import (
    console,
    day,
    found_table,
    json_text,
    memories_table,
    memory_card,
    print_json,
    table,
    wants_json,
)

_CONSISTENCY = click.Choice(["linearizable", "session", "eventual"])


def _legs(text: str | None) -> dict[str, float] | list[str] | None:
    """`bm25,vector` as a list, `bm25=1,vector=2` as weights. Raises click.UsageError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    weights: dict[str, float] = {}
    for part in parts:
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            raise click.UsageError(f"--legs: {weight!r} is not a weight.") from None
    return weights


def _read_options(command: F) -> F:
    """How fresh an answer must be."""
    for option in (
        click.option("--token", help="Of an earlier answer, with --consistency session."),
        click.option("--consistency", type=_CONSISTENCY),
    ):
        command = option(command)
    return command


def _given(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names if fields[name] is not None}


@click.command(short_help="Find memories by meaning, words, phrases and typos.")
@click.argument("query")
@scope_options
@click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--filter", "filter_text", metavar="JSON", help="A filter, as in the API.")
@click.option(
    "--legs",
    "legs_text",
    metavar="NAMES",
    help="Engines: bm25,vector, or with weights bm25=1,vector=2.",
)
@click.option("--threshold", type=click.FloatRange(0, 1), help="Lowest score.")
@click.option("--fusion", type=click.Choice(["weighted", "rrf"]))
@_read_options
@click.option("--explain", is_flag=True, help="Show each engine's rank and score.")
@connection_options
def search(
    query: str,
    top_k: int,
    filter_text: str | None,
    legs_text: str | None,
    explain: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """Find the best memories for QUERY.

    \b
    agentmem search "what does Ana drink?" --user ana
    agentmem search tea --user ana --filter '{"created_at": {"gte": "2026-01-01"}}'
    agentmem search "oolong" --explain --legs bm25,vector
    """
    options = _given(fields, "threshold", "fusion", "consistency", "token")
    legs = _legs(legs_text)
    with open_client(url, api_key, timeout_s) as memory:
        found = memory.search(
            query,
            top_k=top_k,
            filters=json_object(filter_text, "--filter"),
            legs=legs,
            explain=explain,
            **scope_of(fields),
            **options,
        )
    if wants_json(as_json):
        print_json(found)
        return Exit.OK
    out = console()
    out.print(_explained(found) if explain else found_table(found))
    if not found.results:
        out.print("nothing found")
    if found.partial:
        out.print(f"[yellow]without shards {', '.join(found.partial)}, which did not answer[/]")
    return Exit.OK


def _explained(found: client.SearchResult) -> Table:
    names = sorted({name for hit in found for name in hit.legs})

    def cell(hit: client.Found, leg: str) -> str:
        told = hit.legs.get(leg)
        if not isinstance(told, dict):
            return "-"
        return f"#{told.get('rank')} {float(told.get('score', 0.0)):.3f}"

    return table(
        (">*score", "memory", *(f"*{name}" for name in names), "*id"),
        ((f"{h.score:.3f}", h.content, *(cell(h, n) for n in names), h.id) for h in found),
    )


@click.command("list", short_help="List memories, newest first.")
@scope_options
@click.option("--filter", "filter_text", metavar="JSON", help="A filter, as in the API.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--all", "wants_all", is_flag=True, help="Every one, whatever --limit says.")
@click.option("--jsonl", is_flag=True, help="JSON Lines, one memory each; `add --file` reads them.")
@_read_options
@connection_options
def list_command(
    filter_text: str | None,
    limit: int,
    wants_all: bool,
    jsonl: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """List memories, newest first.

    \b
    agentmem list --user ana
    agentmem list --user ana --all --jsonl > ana.jsonl
    agentmem list --filter '{"categories": {"contains": "diary"}}' --limit 100
    """
    options: dict[str, Any] = {
        "filters": json_object(filter_text, "--filter"),
        **scope_of(fields),
        **_given(fields, "consistency", "token"),
    }
    options["limit"] = 500 if wants_all else min(limit, 500)
    with open_client(url, api_key, timeout_s) as memory:
        every = memory.list(**options)
        chosen = every if wants_all else itertools.islice(every, limit)
        if jsonl:
            for one in chosen:
                click.echo(json_text(one))
            return Exit.OK
        results = list(chosen)
        has_more = not wants_all and next(every, None) is not None
    if wants_json(as_json):
        print_json({"results": results, "has_more": has_more})
        return Exit.OK
    out = console()
    out.print(memories_table(results))
    if has_more:
        out.print(f"[dim]the newest {len(results)}; --all shows every one[/dim]")
    elif not results:
        out.print("no memories")
    return Exit.OK


@click.command(short_help="Show one memory.")
@click.argument("memory_id", metavar="ID")
@_read_options
@connection_options
def get(
    memory_id: str,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """Show every field of one memory.

    \b
    agentmem get 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7
    """
    with open_client(url, api_key, timeout_s) as memory:
        found = memory.get(memory_id, **_given(fields, "consistency", "token"))
    if wants_json(as_json):
        print_json(found)
    else:
        console().print(memory_card(found))
    return Exit.OK


@click.command(short_help="Show every version of a memory.")
@click.argument("memory_id", metavar="ID")
@connection_options
def history(
    memory_id: str, url: str, api_key: str | None, timeout_s: float | None, as_json: bool
) -> int:
    """Show every version of a memory, oldest first, its deletion included.

    \b
    agentmem history 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7
    """
    with open_client(url, api_key, timeout_s) as memory:
        versions = memory.history(memory_id)
    if wants_json(as_json):
        print_json({"results": versions})
        return Exit.OK
    console().print(
        table(
            (">*version", "*event", "*at", "before", "after"),
            (
                (str(v.version), v.event, day(v.at), v.old_content or "", v.new_content or "")
                for v in versions
            ),
        )
    )
    return Exit.OK
