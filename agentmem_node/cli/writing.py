"""`agentmem add`, `update` and `delete`."""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import agentmem_client as client
from agentmem_node.cli.connect import connection_options, open_client, scope_of, scope_options
from agentmem_node.cli.exits import CommandFailed, Exit, exit_of, failure
from agentmem_node.cli.fields import memory_fields, memory_options
from agentmem_node.cli.inputs import InputError, read_memories
from agentmem_node.cli.output import console, memory_card, print_json, wants_json

_REFUSED_SHOWN_MAX = 10


@click.command(short_help="Store a text, or every memory of a file.")
@click.argument("text", required=False)
@click.option("--file", "path", metavar="FILE", help="Text or JSON Lines; `-` reads stdin.")
@scope_options
@memory_options
@click.option("--created-at", metavar="TIME", help="RFC 3339; back-dates the memory.")
@click.option("--idempotency-key", metavar="KEY", help="A repeat under it takes effect once.")
@connection_options
def add(
    text: str | None,
    path: str | None,
    idempotency_key: str | None,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """Store TEXT, or every memory of a file, for at least one of --user, --agent, --app, --run.

    A file is text (one memory a paragraph, or a line when it has no empty lines) or JSON Lines
    (objects with `content`, `user_id`, `metadata`, ...; what they leave out comes from the
    options). `-` reads standard input.

    \b
    agentmem add "Ana likes oolong tea" --user ana
    agentmem add --file diary.txt --user ana --category diary
    agentmem add --file conversations.jsonl
    agentmem list --user ana --all --jsonl | jq -c '.user_id = "ben"' | agentmem add --file -
    """
    if text is None and path is None:
        raise click.UsageError('Give a text, like `agentmem add "..." --user ana`, or --file.')
    if text is not None and path is not None:
        raise click.UsageError("Give a text or --file, not both.")
    shared = {**scope_of(fields), **memory_fields(fields)}
    with open_client(url, api_key, timeout_s) as memory:
        if text is not None:
            added = memory.add(text, idempotency_key=idempotency_key, **shared)
            if wants_json(as_json):
                print_json(added)
            else:
                for stored in added.memories:
                    console().print(f"stored [bold]{stored.id}[/bold]")
            return Exit.OK
        assert path is not None
        return _add_file(memory, path, shared, idempotency_key, as_json=as_json)


def _add_file(
    memory: client.Client,
    path: str,
    shared: dict[str, Any],
    given_key: str | None,
    *,
    as_json: bool,
) -> int:
    key = given_key or secrets.token_hex(12)
    shows_bar = sys.stderr.isatty()
    bar = Progress(
        TextColumn("storing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not shows_bar,
        transient=True,
        console=_stderr_console(),
    )
    done = 0
    try:
        with _opened(path) as file, bar:
            items = list(read_memories(file, "standard input" if path == "-" else path))
            if not items:
                raise CommandFailed(f"{path} holds no memory.", Exit.USAGE)
            task = bar.add_task("", total=len(items))

            def step(count: int, _part: object) -> None:
                nonlocal done
                done = count
                bar.update(task, completed=count)

            added = memory.add_many(
                items,
                # Small enough that the bar moves and one request stays short.
                batch_size=200,
                progress=step,
                idempotency_key=key,
                **shared,
            )
    except InputError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    except client.AgentMemError as error:
        stored = 0 if error.stored is None else len(error.stored.memories)
        told = failure(error)
        told.message = (
            f"{error.message} {stored} of the memories were stored before. {_to_go_on(key)}"
        )
        raise told from error
    except KeyboardInterrupt:
        raise CommandFailed(
            f"Stopped after {done} memories, or a few more. {_to_go_on(key)}", Exit.INTERRUPTED
        ) from None
    refused = added.errors
    if wants_json(as_json):
        print_json(added)
    else:
        console().print(f"stored [bold]{len(added.memories)}[/bold] memories")
    for at, refusal in refused[:_REFUSED_SHOWN_MAX]:
        click.echo(f"refused: memory {at + 1}: {refusal.message}", err=True)
    if len(refused) > _REFUSED_SHOWN_MAX:
        click.echo(f"refused: {len(refused) - _REFUSED_SHOWN_MAX} more", err=True)
    return exit_of(refused[0][1]) if refused else Exit.OK


def _to_go_on(key: str) -> str:
    return f"To go on without storing any twice: repeat the command with --idempotency-key {key}"


def _stderr_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _opened(path: str) -> TextIO:
    if path == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8")
    try:
        return Path(path).open(encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"Cannot read {path}: {error.strerror}.", Exit.USAGE) from error


@click.command(short_help="Change a memory.")
@click.argument("memory_id", metavar="ID")
@click.argument("text", required=False)
@memory_options
@click.option(
    "--expected-version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Change it only if this is still its version; else exit 5.",
)
@click.option("--idempotency-key", metavar="KEY", help="A repeat under it takes effect once.")
@connection_options
def update(
    memory_id: str,
    text: str | None,
    expected_version: int | None,
    idempotency_key: str | None,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """Change the text or other fields of a memory; what is not given stays.

    \b
    agentmem update 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7 "Ana prefers coffee now"
    agentmem update 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7 --importance 0.9 --expected-version 1
    """
    changes = memory_fields(fields)
    if text is None and not changes:
        raise click.UsageError("Give a new text, or an option that changes something.")
    if changes.get("expires_at") == "":
        changes["expires_at"] = None
    with open_client(url, api_key, timeout_s) as memory:
        changed = memory.update(
            memory_id,
            text,
            expected_version=expected_version,
            idempotency_key=idempotency_key,
            **changes,
        )
    if wants_json(as_json):
        print_json(changed)
    else:
        console().print(memory_card(changed))
    return Exit.OK


@click.command(short_help="Delete memories.")
@click.argument("memory_ids", metavar="ID...", nargs=-1, required=True)
@click.option(
    "--expected-version",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete only if this is still its version; of one memory.",
)
@connection_options
def delete(
    memory_ids: tuple[str, ...],
    expected_version: int | None,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Delete memories by id; `-` reads ids from standard input, one a line.

    \b
    agentmem delete 0196e4a1-7c00-8a3f-9b1c-d2e3f4a5b6c7
    agentmem list --user ana --json | jq -r '.results[].id' | agentmem delete -
    """
    ids = list(_ids(memory_ids))
    if not ids:
        if wants_json(as_json):
            print_json({"results": []})
        return Exit.OK
    if expected_version is not None and len(ids) != 1:
        raise click.UsageError("--expected-version goes with one id.")
    with open_client(url, api_key, timeout_s) as memory:
        if len(ids) == 1:
            memory.delete(ids[0], expected_version=expected_version)
            results: tuple[client.Deleted, ...] = (client.Deleted(id=ids[0]),)
        else:
            results = memory.delete_many(ids).results
    failed = [item for item in results if item.error is not None]
    if wants_json(as_json):
        print_json({"results": results})
    else:
        console().print(f"deleted [bold]{len(results) - len(failed)}[/bold]")
    for item in failed:
        assert item.error is not None
        click.echo(f"not deleted: {item.id}: {item.error.message}", err=True)
    return exit_of(failed[0].error) if failed and failed[0].error else Exit.OK


def _ids(given: tuple[str, ...]) -> Iterator[str]:
    for memory_id in given:
        if memory_id == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        else:
            yield memory_id
