"""`agentmem config`, `key` and `version`: what needs no node."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import click

from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.cli.groups import SuggestingGroup
from agentmem_node.cli.output import console, print_json, table, wants_json
from agentmem_node.cli.serve import overrides_of
from agentmem_node.config import KEYS, ConfigError, Settings, load

_FILE = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False), help="node.toml to read."
)
_SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
_PACKAGES = ("agentmem-cluster", "pysyncobj", "lmdb", "faiss-cpu", "tantivy", "aiohttp", "uvloop")
_JSON = click.option("--json", "as_json", is_flag=True, help="JSON; the default into a pipe.")


def _load(config_path: str | None, assignments: tuple[str, ...]) -> Settings:
    try:
        return load(config_path, overrides=overrides_of(assignments))
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error


@click.group(cls=SuggestingGroup, short_help="Explain settings.")
def config() -> None:
    """Explain settings: what they mean, what they are, and where that comes from."""


@config.command()
@click.argument("name", metavar="KEY")
@_FILE
@_SET
@_JSON
def explain(
    name: str, config_path: str | None, assignments: tuple[str, ...], as_json: bool
) -> None:
    """What KEY means, its value here, and where that was set.

    \b
    agentmem config explain limits.top_k_max
    agentmem config explain raft.heartbeat_ms --config node.toml
    """
    settings = _load(config_path, assignments)
    try:
        explanation = settings.explain(name)
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.NOT_FOUND) from error
    if not wants_json(as_json):
        click.echo(str(explanation))
        return
    key = explanation.key
    print_json(
        {
            "key": key.name,
            "value": _plain(explanation.value),
            "source": explanation.source,
            "default": _plain(key.default),
            "meaning": key.meaning,
            "allowed": key.allowed,
            "variable": key.variable,
        }
    )


@config.command("list")
@_FILE
@_SET
@_JSON
def list_settings(config_path: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Every setting with its value and origin.

    \b
    agentmem config list
    AGENTMEM_NODE_LISTEN=127.0.0.1:7800 agentmem config list --config node.toml
    """
    settings = _load(config_path, assignments)
    found = [settings.explain(name) for name in KEYS]
    if wants_json(as_json):
        print_json(
            [{"key": e.key.name, "value": _plain(e.value), "source": e.source} for e in found]
        )
        return
    import msgspec

    console().print(
        table(
            ("*key", "value", "set by"),
            (
                (
                    e.key.name,
                    "unset" if e.value is None else msgspec.json.encode(e.value).decode(),
                    e.source,
                )
                for e in found
            ),
        )
    )


def _plain(value: object) -> object:
    import msgspec

    return msgspec.to_builtins(value)


@click.group(cls=SuggestingGroup, short_help="Make API keys.")
def key() -> None:
    """Make API keys."""


@key.command()
@click.option("--tenant", default="default", show_default=True, help="organisation[/project]")
@click.option("--id", "key_id", default="", help="A name for logs. Default: part of the hash.")
@click.option("--admin", "is_admin", is_flag=True, help="It may also change the cluster.")
@_JSON
def new(tenant: str, key_id: str, is_admin: bool, as_json: bool) -> None:
    """Make a key and print it, once, with the line that lets it in.

    Only the key's hash stands in the configuration: a stolen file opens nothing.

    \b
    agentmem key new --tenant acme
    agentmem key new --id ops --admin
    """
    from agentmem_cluster.realtime import RealRng
    from agentmem_node.security.keys import check_tenant, hash_key, new_key

    try:
        check_tenant(tenant)
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    made = new_key(RealRng())
    digest = hash_key(made).hex()
    key_id = key_id or digest[:8]
    admin = ", admin = true" if is_admin else ""
    line = f'{{ tenant = "{tenant}", id = "{key_id}"{admin}, key_hash = "{digest}" }}'
    if wants_json(as_json):
        print_json(
            {
                "key": made,
                "tenant": tenant,
                "id": key_id,
                "admin": is_admin,
                "key_hash": digest,
                "toml": line,
            }
        )
        return
    click.echo(f"{made}\n")
    click.echo("Keep it: it is shown only now. On every node, in node.toml:\n")
    click.echo(f"[security]\napi_keys = [\n  {line},\n]\n")
    click.echo("Clients send it with --api-key, AGENTMEM_API_KEY or Authorization: Bearer.")


@click.command(short_help="Show versions.")
@_JSON
def version(as_json: bool) -> None:
    """Show the versions of AgentMem and of what it stands on."""
    found = {name: _version_of(name) for name in _PACKAGES}
    found["python"] = platform.python_version()
    found["platform"] = f"{sys.platform} {platform.machine()}"
    if wants_json(as_json):
        print_json(found)
        return
    console().print(table(("*name", "version"), found.items()))


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
