"""`agentmem serve`: one node as this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import click

from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.cli.join import JoinOptions, join_first, joined_config

# A node that does not end by itself after its parent died is ended.
_ORPHAN_STOP_S = 15.0


def overrides_of(assignments: tuple[str, ...]) -> dict[str, Any]:
    """`("raft.heartbeat_ms=50",)` as `{"raft.heartbeat_ms": "50"}`. Raises click.UsageError."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"--set takes SECTION.KEY=VALUE, not {assignment!r}.")
        overrides[name.strip()] = value.strip()
    return overrides


@click.command(short_help="Run a node.")
@click.option("--data", metavar="DIR", help="Data directory. Default: ./agentmem-data.")
@click.option("--listen", metavar="HOST:PORT", help="HTTP address. Default: 127.0.0.1:7700.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    help="node.toml. Default: the file that AGENTMEM_CONFIG names, if any.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting.")
@click.option("--id", "node_id", metavar="ID", help="This node's name. Default: n1.")
@click.option("--peer-listen", metavar="HOST:PORT", help="Address for the other nodes.")
@click.option("--zone", metavar="ZONE", help="Where it stands: replicas are spread over zones.")
@click.option(
    "--join",
    "join_token",
    envvar="AGENTMEM_JOIN_TOKEN",
    metavar="TOKEN",
    help="Join a cluster, once. Better in AGENTMEM_JOIN_TOKEN: others can read a command line.",
)
@click.option("--at", metavar="URL", help="With --join: a node of the cluster, or several.")
@click.option("--advertise", metavar="HOST", help="With --join: where others reach this machine.")
@click.option(
    "--advertise-peer",
    metavar="HOST:PORT",
    help="With --join: where others dial it, when that is not where it listens (NAT, a proxy).",
)
@click.option("--parent-pipe", type=int, hidden=True)
def serve(
    data: str | None,
    listen: str | None,
    config_path: str | None,
    assignments: tuple[str, ...],
    node_id: str | None,
    peer_listen: str | None,
    zone: str | None,
    join_token: str | None,
    at: str | None,
    advertise: str | None,
    advertise_peer: str | None,
    parent_pipe: int | None,
) -> int:
    """Run a node in the foreground until Ctrl-C or SIGTERM.

    Alone it is a complete store. With a configuration that lists `cluster.nodes` it is a member
    of a cluster. With a token of `agentmem cluster join-token` it joins one; what it needs it
    writes into --data, and from then on `agentmem serve --data DIR` is enough.

    Settings come from the file, then AGENTMEM_* variables, then the options here.

    \b
    agentmem serve --data ./data
    agentmem serve --config node.toml
    agentmem serve --join TOKEN --at http://10.0.0.1:7700 --id n4 --data ./n4 \\
        --listen 10.0.0.4:7700 --peer-listen 10.0.0.4:7800
    agentmem serve --data ./data --set limits.top_k_max=200 --set node.log_level=debug
    """
    from agentmem_node.config import ConfigError, load

    overrides = overrides_of(assignments)
    given = {
        "node.data_dir": data,
        "node.listen": listen,
        "node.id": node_id,
        "node.peer_listen": peer_listen,
        "node.zone": zone,
    }
    overrides |= {name: value for name, value in given.items() if value is not None}
    try:
        if join_token is not None:
            options = JoinOptions(join_token, at, advertise, advertise_peer)
            settings = load(join_first(options, config_path, overrides), overrides=overrides)
        else:
            settings = load(config_path, overrides=overrides)
            if config_path is None and (own := joined_config(settings.config)) is not None:
                settings = load(own, overrides=overrides)
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    if parent_pipe is not None:
        threading.Thread(
            target=_end_with_parent, args=(parent_pipe,), name="parent-pipe", daemon=True
        ).start()
    # Imported late, so that a wrong setting is reported at once.
    from agentmem_node.run import serve as run_node

    return run_node(settings.config, announce=_announce)


def _announce(line: str) -> None:
    click.echo(line, err=line.startswith("error:"))


def _end_with_parent(pipe: int) -> None:
    """Stop this process when the writing end of the pipe is gone: its parent has died."""
    try:
        while os.read(pipe, 1):
            pass
    except OSError as error:
        logging.getLogger("agentmem.run").warning("the pipe to the parent broke: %s", error)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_STOP_S)
    os._exit(Exit.FAILED)
