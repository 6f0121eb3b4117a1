"""What `agentmem serve --join` does before it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentmem_node.cli.exits import CommandFailed, Exit

if TYPE_CHECKING:
    from agentmem_node.config_keys import Config

_WILDCARDS = ("0.0.0.0", "::")  # every address of the machine: none at which others reach it


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """`serve`'s options that concern joining."""

    token: str
    at: str | None
    advertise: str | None
    advertise_peer: str | None = None


def joined_config(config: Config) -> Path | None:
    """The node.toml that joining left in the data directory, if this node has joined.

    Raises CommandFailed when there is one that cannot be read.
    """
    path = Path(config.node.data_dir) / "node.toml"
    if not path.exists():
        return None  # nearly always, and without the imports that joining needs
    from agentmem_node.service.join_client import JoinFailed, has_joined

    try:
        return path if has_joined(path.parent) else None
    except JoinFailed as error:
        raise CommandFailed(str(error), Exit.USAGE) from error


def join_first(options: JoinOptions, config_path: str | None, overrides: Mapping[str, Any]) -> Path:
    """Join, unless this directory has; the node.toml to serve with. Raises CommandFailed."""
    import msgspec

    from agentmem_client.aio import seed_urls
    from agentmem_node.config import ConfigError, check_startup, load
    from agentmem_node.service.join_client import JoinFailed, Newcomer, has_joined, join
    from agentmem_node.service.join_tokens import BadToken, JoinToken
    from agentmem_node.service.status import Status

    try:
        settings = load(config_path, overrides=overrides)
        node = settings.config.node
        data = Path(node.data_dir)
        if has_joined(data):
            click.echo(f"{data} has joined already: the token is not used")
            return data / "node.toml"
        if options.at is None or not options.at.strip(" ,"):
            raise click.UsageError("--join needs --at: the URL of a node of the cluster.")
        if "node.id" not in settings.sources:
            raise click.UsageError("--join needs --id: a name that no node of the cluster has.")
        if "node.peer_listen" not in settings.sources or node.peer_listen is None:
            raise click.UsageError("--join needs --peer-listen: HOST:PORT for the other nodes.")
        if settings.config.cluster.nodes:
            raise click.UsageError("cluster.nodes is set: a node that joins is told of the others.")
        urls = seed_urls(options.at)
        check_startup(settings.config, has_certificates=True)
        chosen = {
            name: msgspec.to_builtins(settings.explain(name).value)
            for name, source in settings.sources.items()
            if not source.startswith("environment ")
        }
        newcomer = Newcomer(
            node.id,
            data,
            peer=_peer_address(options, node.peer_listen),
            http=f"http://{_reachable(node.listen, options.advertise, '--listen')}",
            zone=node.zone,
            version=Status.VERSION,
            settings=chosen,
        )
        written = join(newcomer, JoinToken.parse(options.token), urls, say=_say)
    except BadToken as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    except JoinFailed as error:
        raise CommandFailed(str(error)) from error
    click.echo(f"node {node.id} has joined; its settings are in {written}")
    return written


def _peer_address(options: JoinOptions, peer_listen: str) -> str:
    """Where the others dial this node. Raises ConfigError and click.UsageError."""
    from agentmem_node.config import split_address

    if options.advertise_peer is None:
        return _reachable(peer_listen, options.advertise, "--peer-listen")
    split_address(options.advertise_peer, "--advertise-peer")
    return options.advertise_peer


def _reachable(address: str, advertise: str | None, option: str) -> str:
    """HOST:PORT at which others reach what listens on `address`. Raises click.UsageError."""
    from agentmem_node.config import split_address

    host, port = split_address(address, option)
    if advertise is None and host in _WILDCARDS:
        raise click.UsageError(
            f"{option} {address} is every address of this machine: say with --advertise HOST at "
            "which of them the others reach it."
        )
    host = (advertise or host).strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(line: str) -> None:
    click.echo(line, err=True)
