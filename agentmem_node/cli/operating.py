"""`agentmem cluster operations`, `stop`, `resume` and `check`."""

from __future__ import annotations

import time

import click
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

import agentmem_client as client
from agentmem_node.cli.admin import Admin, open_admin
from agentmem_node.cli.connect import connection_options
from agentmem_node.cli.exits import Exit, failure
from agentmem_node.cli.following import how_to_go_on
from agentmem_node.cli.output import console, print_json, table, wants_json
from agentmem_node.cli.plan_view import operation_line, operation_view, operations_table
from agentmem_node.model import operations as ops

_WATCH_S = 1.0


@click.command(short_help="List operations, or show one, with progress.")
@click.argument("operation_id", metavar="[ID]", required=False)
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C, or its end.")
@connection_options
def operations(
    operation_id: str | None,
    watch: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Every operation, newest first, or the one with ID and each of its shards.

    \b
    agentmem cluster operations
    agentmem cluster operations 7f3a9c01 --watch
    """
    with open_admin(url, api_key, timeout_s) as admin:
        if wants_json(as_json):
            print_json(
                msgspec.to_builtins(admin.operation(operation_id))
                if operation_id is not None
                else {"operations": msgspec.to_builtins(admin.operations())}
            )
        elif watch:
            _watch(admin, operation_id)
        else:
            console().print(_view(_asked(admin, operation_id), operation_id))
    return Exit.OK


def _asked(admin: Admin, operation_id: str | None) -> list[ops.Operation]:
    return admin.operations() if operation_id is None else [admin.operation(operation_id)]


def _view(found: list[ops.Operation], operation_id: str | None) -> Group:
    if operation_id is not None:
        return operation_view(found[0])
    if not found:
        return Group(Text("there is no operation"))
    running = [operation for operation in found if operation.state == "running"]
    parts = [part for operation in running for part in (Text(), operation_view(operation))]
    return Group(operations_table(found), *parts)


def _watch(admin: Admin, operation_id: str | None) -> None:
    found = _asked(admin, operation_id)  # an id that is none ends the command
    with Live(_view(found, operation_id), console=console(), auto_refresh=False) as live:
        while operation_id is None or found[0].state == "running":
            time.sleep(_WATCH_S)
            try:
                found = _asked(admin, operation_id)
                live.update(_view(found, operation_id), refresh=True)
            except client.TemporarilyUnavailable as error:
                live.update(Text(failure(error).message), refresh=True)


@click.command(short_help="Stop an operation.")
@click.argument("operation_id", metavar="ID")
@connection_options
def stop(
    operation_id: str, url: str, api_key: str | None, timeout_s: float | None, as_json: bool
) -> int:
    """Stop the operation with ID: no further shard is begun.

    The shard under way ends whole: its new members serve, or the old ones go on.

    \b
    agentmem cluster stop 7f3a9c01
    """
    with open_admin(url, api_key, timeout_s) as admin:
        operation = admin.stop(operation_id)
    if wants_json(as_json):
        print_json(msgspec.to_builtins(operation))
    else:
        console().print(operation_view(operation))
        click.echo(f"Go on: agentmem cluster resume {operation.id}")
    return Exit.OK


@click.command(short_help="Go on with an operation that was stopped, or failed.")
@click.argument("operation_id", metavar="ID")
@connection_options
def resume(
    operation_id: str, url: str, api_key: str | None, timeout_s: float | None, as_json: bool
) -> int:
    """Go on with the operation with ID that was stopped, or failed: its steps are tried again.

    \b
    agentmem cluster resume 7f3a9c01
    """
    with open_admin(url, api_key, timeout_s) as admin:
        operation = admin.resume(operation_id)
    if wants_json(as_json):
        print_json(msgspec.to_builtins(operation))
    else:
        console().print(operation_line(operation))
        click.echo(how_to_go_on(operation.id))
    return Exit.OK


@click.command(short_help="Check everything that must hold of the cluster.")
@connection_options
def check(url: str, api_key: str | None, timeout_s: float | None, as_json: bool) -> int:
    """Check everything that must hold of the cluster: one line each, ok or FAILED.

    Exit code 0 when all holds, else 4.

    \b
    agentmem cluster check
    """
    with open_admin(url, api_key, timeout_s) as admin:
        findings = admin.check()
    is_ok = all(finding.ok for finding in findings)
    if wants_json(as_json):
        print_json({"ok": is_ok, "findings": msgspec.to_builtins(findings)})
    else:
        console().print(
            table(
                ("*", "*invariant", "what was found"),
                (
                    (
                        Text("ok", style="green") if one.ok else Text("FAILED", style="red bold"),
                        one.name,
                        one.message,
                    )
                    for one in findings
                ),
                show_header=False,
            )
        )
    return Exit.OK if is_ok else Exit.UNAVAILABLE
