"""Exit codes, and how an error becomes one: `docs/cli.md` lists them, a test keeps it true."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import agentmem_client as client


class Exit(IntEnum):
    """0 is success; everything a script may want to tell apart has a number."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    CONFLICT = 5
    NOT_ALLOWED = 6
    INTERRUPTED = 130


MEANINGS: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILED: "failed, for a reason that no other code names; the message says which",
    Exit.USAGE: "the command, a value or a setting is wrong; trying again will not help",
    Exit.NOT_FOUND: "there is no such memory, node, shard, operation, token or setting",
    Exit.UNAVAILABLE: "no node could be reached, or the cluster cannot answer now; try again",
    Exit.CONFLICT: "somebody else was first, or it cannot be done now; look again and decide",
    Exit.NOT_ALLOWED: "the API key is missing, unknown or not allowed to do this",
    Exit.INTERRUPTED: "stopped by Ctrl-C",
}


class CommandFailed(Exception):
    """Ends the command with a message and one of our exit codes."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def show(self) -> None:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.message}", err=True)


def exit_of(error: client.AgentMemError) -> Exit:
    """The exit code of a client's error."""
    import agentmem_client as client  # here: commands without a client need not wait for it

    match error:
        case client.NotFound():
            return Exit.NOT_FOUND
        case client.Conflict():
            return Exit.CONFLICT
        case client.Unauthorized() | client.Forbidden():
            return Exit.NOT_ALLOWED
        case client.RequestRefused():
            return Exit.USAGE
        case client.TemporarilyUnavailable():
            return Exit.UNAVAILABLE
        case _:
            return Exit.FAILED


def failure(error: client.AgentMemError) -> CommandFailed:
    """A client's error as a person should read it: what, and what to do next."""
    import agentmem_client as client

    hint = ""
    if isinstance(error, client.ConnectionFailed):
        hint = (
            " Is a node running? Start one with `agentmem serve`, or name it with --url or "
            "AGENTMEM_URL."
        )
    elif isinstance(error, client.Unauthorized) and "leave it out" not in error.message:
        hint = " Give a key with --api-key or AGENTMEM_API_KEY."
    if error.outcome_unknown:
        hint += (
            " It is not known whether the write happened. Repeat it with "
            f"--idempotency-key {error.idempotency_key}: it takes effect once."
        )
    return CommandFailed(f"{error.message}{hint}", exit_of(error))
