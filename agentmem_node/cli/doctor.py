"""`agentmem doctor`: can a node run well here, and what to do when not."""

from __future__ import annotations

import click
from rich.text import Text

from agentmem_node.cli.checks import CHECKS, Verdict
from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.cli.output import console, print_json, table, wants_json
from agentmem_node.cli.serve import overrides_of
from agentmem_node.config import ConfigError, load

_STYLE = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red bold"}


@click.command(short_help="Check this machine.")
@click.option("--data", metavar="DIR", help="Data directory to look at.")
@click.option("--listen", metavar="HOST:PORT", help="HTTP address to look at.")
@click.option("--config", "config_path", type=click.Path(dir_okay=False), help="node.toml to read.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
@click.option("--json", "as_json", is_flag=True, help="JSON; the default into a pipe.")
def doctor(
    data: str | None,
    listen: str | None,
    config_path: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> int:
    """Check whether a node can run well here: ports, disk, fsync, clock, files, model.

    Exit code 0 when nothing failed (warnings may be there), else 1.

    \b
    agentmem doctor
    agentmem doctor --config node.toml
    """
    overrides = overrides_of(assignments)
    if data is not None:
        overrides["node.data_dir"] = data
    if listen is not None:
        overrides["node.listen"] = listen
    try:
        settings = load(config_path, overrides=overrides)
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    findings = [check(settings.config) for check in CHECKS]
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    if wants_json(as_json):
        print_json(
            {
                "ok": not failed,
                "checks": [
                    {
                        "name": f.name,
                        "verdict": f.verdict.value,
                        "found": f.found,
                        "advice": f.advice,
                    }
                    for f in findings
                ],
            }
        )
    else:
        console().print(
            table(
                ("*check", "*", "found", "what to do"),
                (
                    (
                        f.name,
                        Text(f.verdict.value, style=_STYLE[f.verdict]),
                        f.found,
                        f.advice,
                    )
                    for f in findings
                ),
            )
        )
    return Exit.FAILED if failed else Exit.OK
