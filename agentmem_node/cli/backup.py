"""`agentmem backup create`, `list`, `verify`, `plan`, `restore`, `rewind` and `prune`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from agentmem_cluster.errors import AgentMemError
from agentmem_node.cli.asking import NodeUnreachable, OneNode
from agentmem_node.cli.changing import carry_out, change_options
from agentmem_node.cli.connect import connection_options, scope_of, scope_options
from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.cli.groups import SuggestingGroup
from agentmem_node.cli.output import console, print_json, table, wants_json
from agentmem_node.model import operations as ops

T = TypeVar("T")

_POLL_S = 0.25
# A node that was asked may be away for a moment, but not for ever.
_SILENCE_S_MAX = 20.0
_FAULTS_SHOWN_MAX = 20
_EXITS = {
    "backup_destination": Exit.USAGE,
    "backup_missing": Exit.NOT_FOUND,
    "backup_busy": Exit.CONFLICT,
    "restore_impossible": Exit.CONFLICT,
    "backup_unreachable": Exit.UNAVAILABLE,
    "no_quorum": Exit.UNAVAILABLE,
}
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON; default into a pipe.")


@click.group(cls=SuggestingGroup, short_help="Make, check and restore backups.")
def backup() -> None:
    """Make, check and restore backups.

    URL is a directory that all nodes share (/var/backups/agentmem), or a bucket
    (s3://bucket/prefix?endpoint=http://127.0.0.1:5000&region=eu-north-1, with credentials in
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node). `create` and `restore` ask a node;
    the others read the place itself. docs/backups.md tells everything.
    """


@backup.command()
@click.argument("destination", metavar="[URL]", required=False)
@click.option("--full", is_flag=True, help="Upload every chunk again, also what is there.")
@connection_options
def create(
    destination: str | None,
    full: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Back up all shards as of one moment. Only what changed is uploaded.

    Without URL, where the setting backup.url says. Interrupted, it leaves no backup behind, and
    the next one goes on with what was uploaded.

    \b
    agentmem backup create /var/backups/agentmem
    agentmem backup create 's3://backups/agents?region=eu-north-1'
    """
    node = OneNode(url, api_key, timeout_s)
    body = {"full": full} | ({} if destination is None else {"url": destination})
    work = _follow(node, node.ask("POST", "/backups", body), "backing up")
    if wants_json(as_json):
        print_json(work)
    else:
        made = work["result"]
        console().print(
            f"backup [bold]{made['backup']}[/bold] of {made['at']}: {made['memories']:,} "
            f"memories, {_size(made['size_bytes'])}, of which {_size(made['uploaded_bytes'])} "
            f"were uploaded; writes waited {made['writes_waited_ms']} ms"
        )
    return Exit.OK


@backup.command(name="list")
@click.argument("destination", metavar="URL")
@_json_option
def list_command(destination: str, as_json: bool) -> int:
    """List the backups at URL, oldest first.

    \b
    agentmem backup list /var/backups/agentmem
    """
    from agentmem_node.backup import catalog
    from agentmem_node.service.backup_work import summary_of

    found = _kept(lambda: catalog.listed(_store(destination)))
    if wants_json(as_json):
        print_json(
            [
                {"id": item.id, "damaged": item.fault}
                if item.manifest is None
                else msgspec.to_builtins(summary_of(item.manifest))
                for item in found
            ]
        )
        return Exit.OK
    if not found:
        console().print(f"There is no backup in {destination}.")
        return Exit.OK
    rows = []
    for item in found:
        if item.manifest is None:
            rows.append((item.id, "damaged", "", "", "", item.fault))
            continue
        one = summary_of(item.manifest)
        sizes = (_size(one.size_bytes), _size(one.uploaded_bytes))
        rows.append((one.id, one.at or "", f"{one.memories:,}", *sizes, one.cluster))
    columns = ("*id", "*at", ">memories", ">size", ">uploaded", "cluster")
    console().print(table(columns, rows))
    return Exit.OK


@backup.command()
@click.argument("destination", metavar="URL")
@click.option("--backup", "backup_id", metavar="ID", help="This one only. Default: everything.")
@_json_option
def verify(destination: str, backup_id: str | None, as_json: bool) -> int:
    """Read every object at URL and check it: manifests, chunks, the archived log.

    Exit code 0 when everything is as it was written, else 1.

    \b
    agentmem backup verify /var/backups/agentmem
    """
    from agentmem_node.backup import verify as checking

    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task("verifying", total=None)
        found = _kept(
            lambda: checking.verify(
                _store(destination),
                backup_id=backup_id,
                told=lambda done, total: bar.update(task, completed=done, total=total),
            )
        )
    if wants_json(as_json):
        print_json(msgspec.to_builtins(found) | {"good": found.is_good})
    else:
        out = console()
        for fault in found.faults[:_FAULTS_SHOWN_MAX]:
            hurt = f" (backup {', '.join(fault.backups)})" if fault.backups else ""
            out.print(f"[red]damaged[/red] {fault.object}{hurt}: {fault.what}", soft_wrap=True)
        if len(found.faults) > _FAULTS_SHOWN_MAX:
            out.print(f"... and {len(found.faults) - _FAULTS_SHOWN_MAX} more; --json has all.")
        for gap in found.gaps:
            out.print(f"[yellow]gap[/yellow] in the archived log of {gap}", soft_wrap=True)
        out.print(
            f"{found.backups} backups, {found.chunks:,} chunks and {found.segments:,} parts of "
            f"the log: {len(found.faults) or 'nothing'} damaged"
        )
    return Exit.OK if found.is_good else Exit.FAILED


@backup.command()
@click.argument("destination", metavar="URL")
@click.option("--at", "at", metavar="TIME", help="RFC 3339. Default: the newest backup itself.")
@click.option("--backup", "backup_id", metavar="ID", help="Begin with this one.")
@_json_option
def plan(destination: str, at: str | None, backup_id: str | None, as_json: bool) -> int:
    """Say how a moment would be restored: which backup, how much of the log, what is missing.

    Exit code 5 when it cannot be.

    \b
    agentmem backup plan /var/backups/agentmem --at 2026-01-31T09:30:00Z
    """
    from agentmem_node.backup import fetch
    from agentmem_node.model.times import format_ms, parse_time_ms

    until_ms = None if at is None else _kept(lambda: parse_time_ms(at, "--at"))
    made = _kept(lambda: fetch.plan(_store(destination), backup_id=backup_id, until_ms=until_ms))
    if wants_json(as_json):
        print_json(
            {
                "backup": made.manifest.id,
                "at": format_ms(made.manifest.at_ms if until_ms is None else until_ms),
                "faults": made.faults,
                "shards": [
                    {
                        "id": s.id,
                        "in_backup": s.in_backup,
                        "taken_back_to": None if s.origin is None else s.origin.backup,
                        "backup_index": s.backup_index,
                        "archived_to": s.archived_to,
                        "gaps": [[gap.first, gap.last] for gap in s.gaps],
                    }
                    for s in made.shards
                ],
            }
        )
    else:
        out = console()
        entries = sum(max(0, s.archived_to - s.backup_index) for s in made.shards)
        out.print(
            f"backup [bold]{made.manifest.id}[/bold] of {format_ms(made.manifest.at_ms)}"
            + ("" if until_ms is None else f", and up to {entries:,} entries of the archived log")
        )
        for shard in made.shards:
            if shard.id != shard.in_backup:
                out.print(f"shard {shard.id} was split off {shard.in_backup} since")
            if shard.origin is not None:
                then = format_ms(shard.origin.at_ms)
                out.print(f"shard {shard.id} was taken back to {shard.origin.backup} at {then}")
            for gap in shard.gaps:
                out.print(f"shard {shard.id}: entries {gap.first} to {gap.last} are missing")
        for fault in made.faults:
            out.print(f"[red]not possible[/red]: {fault}")
    return Exit.CONFLICT if made.faults else Exit.OK


@backup.command()
@click.argument("destination", metavar="[URL]", required=False)
@scope_options
@click.option("--tenant", metavar="NAME", help="Default: the tenant of the API key.")
@click.option("--everything", is_flag=True, help="All tenants, into an empty cluster of any size.")
@click.option("--backup", "backup_id", metavar="ID", help="Default: the newest that fits.")
@click.option("--at", "at", metavar="TIME", help="The moment to go back to, RFC 3339.")
@click.option("--exact", is_flag=True, help="Also delete what the backup does not have.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@connection_options
def restore(
    destination: str | None,
    tenant: str | None,
    everything: bool,
    backup_id: str | None,
    at: str | None,
    exact: bool,
    dry_run: bool,
    yes: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
    **fields: Any,
) -> int:
    """Write memories of a backup back: of one owner, of a tenant, or everything.

    Missing memories are added with their ids, times, versions and history; changed ones get the
    backup's state as their next version; what is equal is left alone. Run again after an
    interruption, it does the rest.

    \b
    agentmem backup restore /var/backups/agentmem --user ana --dry-run
    agentmem backup restore /var/backups/agentmem --user ana --at 2026-01-31T09:30:00Z
    agentmem backup restore /var/backups/agentmem --everything --url http://new:7700
    """
    scope = scope_of(fields)
    if exact and not dry_run and not yes:
        whose = ", ".join(scope.values()) or tenant or "the whole tenant"
        click.confirm(
            f"Delete everything of {whose} that the backup does not have?", abort=True, err=True
        )
    body: dict[str, Any] = {
        "url": destination,
        "tenant": tenant,
        "everything": everything,
        "backup": backup_id,
        "at": at,
        "exact": exact,
        "dry_run": dry_run,
        **scope,
    }
    node = OneNode(url, api_key, timeout_s)
    begun = node.ask("POST", "/backups/restore", {k: v for k, v in body.items() if v})
    work = _follow(node, begun, "restoring")
    if wants_json(as_json):
        print_json(work)
        return Exit.OK
    done = work["result"]
    names = ("added", "updated", "revived", "deleted", "unchanged", "contested")
    counts = ", ".join(f"{done[name]:,} {name}" for name in names if done[name])
    would = "would be restored" if dry_run else "restored"
    console().print(f"{would} from backup [bold]{done['backup']}[/bold]: {counts or 'nothing'}")
    for example in done["examples"] if dry_run else ():
        console().print(f"  {example['id']}  {example['event']}")
    return Exit.OK


@backup.command(short_help="Take the whole cluster back to a backup, or to a moment.")
@click.argument("destination", metavar="URL")
@click.option("--backup", "backup_id", metavar="ID", help="Default: the newest that fits.")
@click.option("--at", "at", metavar="TIME", help="The moment to go back to, RFC 3339.")
@change_options
def rewind(destination: str, backup_id: str | None, at: str | None, **options: Any) -> int:
    """Take every shard back, one after the other: each begins its next epoch from the backup.

    What was written since is gone from the cluster; a backup made before, or the archived log,
    keeps it. The digests are those of the moment. Shards must be cut as they were then.

    \b
    agentmem backup rewind /var/backups/agentmem --dry-run
    agentmem backup rewind /var/backups/agentmem --at 2026-01-31T09:30:00Z
    """
    wish = ops.OperationWish(kind="rewind", url=destination, backup=backup_id, at=at)
    return carry_out(wish, **options)


@backup.command()
@click.argument("destination", metavar="URL")
@click.option("--keep", type=click.IntRange(min=1), required=True, metavar="N")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json_option
def prune(destination: str, keep: int, yes: bool, as_json: bool) -> int:
    """Keep the newest N backups of each cluster, and remove what only older ones needed.

    The archived log is kept from the oldest kept backup on: earlier moments are gone. A backup that
    the cluster was taken back to stays as long as an older state needs it for later moments.

    \b
    agentmem backup prune /var/backups/agentmem --keep 14
    """
    from agentmem_node.backup import prune as pruning

    if not yes:
        click.confirm(
            f"Remove all but the newest {keep} backups in {destination}?", abort=True, err=True
        )
    with _bar(TextColumn("{task.completed} objects")) as bar:
        task = bar.add_task("removing", total=None)
        done = _kept(
            lambda: pruning.prune(
                _store(destination),
                keep,
                now_ms=lambda: int(time.time() * 1000),
                token=os.urandom(4).hex(),
                told=lambda removed: bar.update(task, completed=removed),
            )
        )
    if wants_json(as_json):
        print_json(msgspec.to_builtins(done))
    else:
        console().print(
            f"{len(done.removed)} backups, {done.chunks:,} chunks and {done.segments:,} parts of "
            f"the log removed ({_size(done.freed_bytes)}); {len(done.kept)} backups kept"
        )
    return Exit.OK


# -- following a node's work ----------------------------------------------------------------


def _follow(node: OneNode, work: dict[str, Any], what: str) -> dict[str, Any]:
    """Wait until work has ended, with a bar. Raises CommandFailed when it failed."""
    with _bar(DownloadColumn()) as bar:
        task = bar.add_task(what, total=None)
        heard_s = time.monotonic()
        while work["state"] == "running":
            time.sleep(_POLL_S)
            try:
                work = node.ask("GET", f"/backups/{work['id']}")
            except NodeUnreachable as error:
                if time.monotonic() - heard_s > _SILENCE_S_MAX:
                    raise CommandFailed(
                        f"The node that began {work['id']} is gone: {error.message} A backup is "
                        "done if `agentmem backup list` shows it; a restore can be run again.",
                        Exit.UNAVAILABLE,
                    ) from error
                continue
            heard_s = time.monotonic()
            bar.update(
                task,
                description=work["phase"],
                completed=work["done_bytes"],
                total=work["total_bytes"] or None,
            )
    if work["state"] == "failed":
        why = work.get("error") or {"code": "", "detail": "It was called off: the node stops."}
        raise CommandFailed(why["detail"], _EXITS.get(why["code"], Exit.FAILED))
    return work


def _bar(column: ProgressColumn) -> Progress:
    err = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        column,
        TimeRemainingColumn(),
        disable=not err.is_terminal,
        transient=True,
        console=err,
    )


def _store(destination: str) -> Any:
    from agentmem_node.backup.objects import open_store

    return open_store(destination)


def _kept(work: Callable[[], T]) -> T:
    """The errors of a store as those of a command."""
    try:
        return work()
    except AgentMemError as error:
        code = _EXITS.get(error.code, Exit.USAGE if error.status == 400 else Exit.FAILED)
        raise CommandFailed(f"{error.message} {error.hint}".strip(), code) from error


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
