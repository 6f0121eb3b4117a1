"""How a command finds its cluster, and the options that every such command has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from agentmem_client import Client, Policy
from agentmem_client.aio import DEFAULT_URL

F = TypeVar("F", bound=Callable[..., Any])

# A person waits at a prompt: when nothing at all answers, say so soon.
_UNREACHABLE_S_MAX = 1.5


def connection_options(command: F) -> F:
    """--url, --api-key, --timeout and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="JSON; the default into a pipe."),
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(min=0.01),
            metavar="SECONDS",
            help="Give up after this long. Default: 10, batches 60.",
        ),
        click.option(
            "--api-key",
            envvar="AGENTMEM_API_KEY",
            metavar="KEY",
            help="API key. Better in AGENTMEM_API_KEY: others can read a command line.",
        ),
        click.option(
            "--url",
            envvar="AGENTMEM_URL",
            default=DEFAULT_URL,
            show_default=True,
            metavar="URL",
            help="A node, or several with commas; also AGENTMEM_URL.",
        ),
    ):
        command = option(command)
    return command


def open_client(url: str, api_key: str | None, timeout_s: float | None = None) -> Client:
    """A client for one command. Raises click.UsageError on a URL that is none."""
    defaults = Policy()
    policy = Policy(
        deadline_s=timeout_s or defaults.deadline_s,
        batch_deadline_s=timeout_s or defaults.batch_deadline_s,
        unreachable_s_max=_UNREACHABLE_S_MAX,
    )
    try:
        return Client(url, api_key=api_key, policy=policy)
    except ValueError as error:
        raise click.UsageError(f"--url: {error}") from error


def scope_options(command: F) -> F:
    """--user, --agent, --app and --run, with the API's names as synonyms."""
    for name, whose in (
        ("run", "a session or task"),
        ("app", "an application"),
        ("agent", "an agent"),
        ("user", "a person"),
    ):
        command = click.option(
            f"--{name}", f"--{name}-id", f"{name}_id", metavar="ID", help=f"Id of {whose}."
        )(command)
    return command


def scope_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The scope ids among a command's arguments, without those that were not given."""
    names = ("user_id", "agent_id", "app_id", "run_id")
    return {name: fields[name] for name in names if fields.get(name) is not None}
