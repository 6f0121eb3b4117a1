"""Watching an operation until it ends; it does not need to be watched."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

import agentmem_client as client
from agentmem_node.cli.admin import Admin
from agentmem_node.cli.exits import CommandFailed, Exit, exit_of
from agentmem_node.cli.plan_view import operation_view
from agentmem_node.model import operations as ops

_POLL_S = 0.5
# A leader that died is replaced within seconds: so long, only a cluster without a majority is
# silent.
_SILENCE_S_MAX = 60.0


def follow(admin: Admin, operation: ops.Operation) -> ops.Operation:
    """The operation as it ended. Progress goes to stderr, when that is a terminal.

    Raises CommandFailed on Ctrl-C and when the cluster does not answer for long; either way the
    operation goes on.
    """
    screen = Console(stderr=True, highlight=False)
    try:
        if not screen.is_terminal:
            return _until_it_ends(admin, operation, None)
        # It goes away at the end, because the command then prints how the operation ended.
        with Live(
            operation_view(operation), console=screen, auto_refresh=False, transient=True
        ) as live:
            return _until_it_ends(admin, operation, live)
    except KeyboardInterrupt:
        raise CommandFailed(
            f"No longer watching; the operation goes on. {how_to_go_on(operation.id)}",
            Exit.INTERRUPTED,
        ) from None


def how_to_go_on(operation_id: str) -> str:
    return (
        f"Watch it: agentmem cluster operations {operation_id} --watch. "
        f"Stop it: agentmem cluster stop {operation_id}"
    )


def outcome(operation: ops.Operation) -> int:
    """The exit code of an operation that ended. Raises CommandFailed unless all was done."""
    if operation.state == "done":
        return Exit.OK
    why = operation.message or "; ".join(
        f"{step.shard}: {step.error}" for step in operation.steps if step.error
    )
    ending = "was stopped" if operation.state == "stopped" else operation.state
    told = f"The operation {operation.id} {ending}{f': {why}' if why else ''}".rstrip(".")
    raise CommandFailed(
        f"{told}. What was done stays; every other shard is as it was. To go on: agentmem cluster "
        f"resume {operation.id}",
        Exit.FAILED,
    )


def _until_it_ends(admin: Admin, operation: ops.Operation, live: Live | None) -> ops.Operation:
    heard_s = time.monotonic()
    while operation.state == "running":
        time.sleep(_POLL_S)
        try:
            operation = admin.operation(operation.id)
            heard_s = time.monotonic()
        except client.TemporarilyUnavailable as error:
            if time.monotonic() - heard_s > _SILENCE_S_MAX:
                raise CommandFailed(
                    f"{error.message} The operation goes on as soon as the cluster can. "
                    f"{how_to_go_on(operation.id)}",
                    exit_of(error),
                ) from error
            continue
        if live is not None:
            live.update(operation_view(operation), refresh=True)
    return operation
