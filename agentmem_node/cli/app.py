"""`agentmem`: the commands, their help, and how every error ends.

Commands are imported when they are asked for: `agentmem search` need not load what `serve` does.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from agentmem_node.cli.exits import CommandFailed, Exit, failure
from agentmem_node.cli.groups import SuggestingGroup

# command -> module and attribute; the order is that of `agentmem --help`.
_COMMANDS = {
    "serve": "agentmem_node.cli.serve:serve",
    "demo": "agentmem_node.cli.demo:demo",
    "add": "agentmem_node.cli.writing:add",
    "search": "agentmem_node.cli.reading:search",
    "list": "agentmem_node.cli.reading:list_command",
    "get": "agentmem_node.cli.reading:get",
    "update": "agentmem_node.cli.writing:update",
    "delete": "agentmem_node.cli.writing:delete",
    "history": "agentmem_node.cli.reading:history",
    "cluster": "agentmem_node.cli.cluster:cluster",
    "backup": "agentmem_node.cli.backup:backup",
    "config": "agentmem_node.cli.settings:config",
    "key": "agentmem_node.cli.settings:key",
    "doctor": "agentmem_node.cli.doctor:doctor",
    "version": "agentmem_node.cli.settings:version",
}


class _LazyGroup(SuggestingGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentmem-cluster", prog_name="agentmem")
def cli() -> None:
    """AgentMem: a memory for AI agents that never loses what it acknowledged.

    \b
    agentmem demo                                 see it work, in a minute
    agentmem serve --data ./data                  one node on 127.0.0.1:7700
    agentmem add "Ana likes oolong tea" --user ana
    agentmem search "what does Ana drink?" --user ana

    Commands that talk to a cluster find it by --url or AGENTMEM_URL (default
    http://127.0.0.1:7700) and show a key with --api-key or AGENTMEM_API_KEY. They print tables on
    a terminal, and JSON with --json or into a pipe. Exit codes: 0 done, 1 failed, 2 wrong usage,
    3 not found, 4 unavailable, 5 conflict, 6 not allowed, 130 Ctrl-C.
    """


def run(arguments: Sequence[str]) -> int:
    """The exit code of `agentmem ARGUMENTS`."""
    # The runtime of the embedding model reports to its maker as soon as it is imported, unless
    # this is set. What agents remember is nobody else's business.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        outcome: Any = cli.main(list(arguments), prog_name="agentmem", standalone_mode=False)
        return outcome if isinstance(outcome, int) else Exit.OK
    except CommandFailed as failed:
        failed.show()
        return failed.code
    except click.UsageError as wrong:
        wrong.show()
        return Exit.USAGE
    except click.ClickException as failed:
        failed.show()
        return Exit.FAILED
    except (click.exceptions.Abort, KeyboardInterrupt):
        # The cursor stands behind ^C: the shell's prompt belongs on a line of its own.
        click.echo("", err=True)
        return Exit.INTERRUPTED
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except _client_error() as error:
        failed_command = failure(error)
        failed_command.show()
        return failed_command.code


def _client_error() -> type[Any]:
    """The root of the client's errors, or a class that nothing raises when it was not loaded."""
    module = sys.modules.get("agentmem_client")
    return getattr(module, "AgentMemError", _Never)


class _Never(Exception):
    """Raised by nobody."""
