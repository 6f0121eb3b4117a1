"""`agentmem cluster join-token`, `join-tokens` and `revoke-token`."""

from __future__ import annotations

import re

import click
import msgspec

from agentmem_client.aio import seed_urls
from agentmem_node.cli.admin import open_admin
from agentmem_node.cli.connect import connection_options
from agentmem_node.cli.output import console, print_json, table, wants_json
from agentmem_node.service.join_messages import USES_MAX, JoinTokenKept
from agentmem_node.service.join_tokens import BadToken, JoinToken

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> int:
    """`90s`, `30m`, `1h`, `2d`. Raises click.UsageError."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise click.UsageError(f"--ttl takes a number with s, m, h or d, like 1h, not {text!r}.")
    return int(match[1]) * _UNITS[match[2]]


@click.command("join-token", short_help="Make a token with which a new node joins.")
@click.option(
    "--ttl", default="1h", show_default=True, help="How long it can be used: 90s, 1h, 2d."
)
@click.option("--uses", type=click.IntRange(1, USES_MAX), default=1, show_default=True)
@click.option("--node", metavar="ID", help="The only id that it lets in.")
@connection_options
def join_token(
    ttl: str,
    uses: int,
    node: str | None,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Make a token with which a new node joins, and gets its certificate.

    Whoever has it can make a node: hand it over as you would a password. To give the id of a
    node whose disk is lost to a new one, name it with --node.

    \b
    agentmem cluster join-token
    agentmem cluster join-token --ttl 15m --node n4
    """
    with open_admin(url, api_key, timeout_s) as admin:
        made = admin.join_token(ttl_s=seconds_of(ttl), uses=uses, node=node)
    if wants_json(as_json):
        print_json(msgspec.to_builtins(made))
        return
    whom = f"node {node}" if node else f"{uses} {'node' if uses == 1 else 'nodes'}"
    click.echo(f"{made.token}\n")
    click.echo(f"It lets {whom} in until {made.expires_at}, and its id is {made.id}.")
    click.echo("On the new machine:\n")
    click.echo(
        f"agentmem serve --join TOKEN --at {seed_urls(url)[0]} --id {node or 'ID'} --data DIR "
        "--listen HOST:PORT --peer-listen HOST:PORT"
    )


@click.command("join-tokens", short_help="List join tokens, and whom they have let in.")
@connection_options
def join_tokens(url: str, api_key: str | None, timeout_s: float | None, as_json: bool) -> None:
    """Join tokens until a day after their end, by the id that stands in the log and for
    `agentmem cluster revoke-token`. No token itself: the cluster does not keep it.

    \b
    agentmem cluster join-tokens
    """
    with open_admin(url, api_key, timeout_s) as admin:
        found = admin.join_tokens()
    if wants_json(as_json):
        print_json({"tokens": msgspec.to_builtins(found)})
    elif not found:
        click.echo("there is no join token")
    else:
        columns = ("*TOKEN", "*STATE", "*UNTIL", "LETS IN", "HAS LET IN")
        console().print(table(columns, [_row(token) for token in found]))


def _row(token: JoinTokenKept) -> tuple[str, ...]:
    whom = token.node or f"{token.uses} {'node' if token.uses == 1 else 'nodes'}"
    state = token.state.replace("_", " ")
    return token.id, state, token.expires_at, whom, ", ".join(token.joined) or "-"


def _id_of(given: str) -> str:
    """Raises click.UsageError for what is neither: a secret that was pasted with something before
    it must not be sent as an id."""
    if re.fullmatch(r"[0-9a-f]{16}", given.strip()):
        return given.strip()
    try:
        return JoinToken.parse(given).id
    except BadToken as error:
        raise click.UsageError(f"{error} An id is 16 hexadecimal digits.") from error


@click.command("revoke-token", short_help="Revoke a join token.")
@click.argument("token", metavar="ID|TOKEN")
@connection_options
def revoke_token(
    token: str, url: str, api_key: str | None, timeout_s: float | None, as_json: bool
) -> None:
    """Let nobody join any more with a token: the one with ID, as `agentmem cluster join-tokens` has
    it, or the TOKEN itself.

    A node that it has let in stays: `agentmem cluster remove` takes it out.

    \b
    agentmem cluster revoke-token 1f6b0c2d9a3e4857
    """
    with open_admin(url, api_key, timeout_s) as admin:
        revoked = admin.revoke_join_token(_id_of(token))
    if wants_json(as_json):
        print_json(msgspec.to_builtins(revoked))
        return
    click.echo(f"token {revoked.id} is revoked")
    if revoked.joined:
        click.echo(f"it had let {', '.join(revoked.joined)} in, which stays")
