"""`agentmem cluster`: `dev`, `certs` and `status` are here, what changes a cluster beside it."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import click
from rich.live import Live

import agentmem_client as client
from agentmem_client.aio import seed_urls
from agentmem_node.cli.changing import drain, move, rebalance, remove, split
from agentmem_node.cli.connect import connection_options
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.devlayout import DevClusterError
from agentmem_node.cli.exits import CommandFailed, Exit, failure
from agentmem_node.cli.groups import SuggestingGroup
from agentmem_node.cli.join_tokens import join_token, join_tokens, revoke_token
from agentmem_node.cli.operating import check, operations, resume, stop
from agentmem_node.cli.output import console, print_json, wants_json
from agentmem_node.cli.serve import overrides_of
from agentmem_node.cli.status import ask, render

_WATCH_S = 1.0
_CRASH_POLL_S = 0.2
# As agentmem_node.config_keys.NodeId has it.
_NODE_ID = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"


@click.group(cls=SuggestingGroup, short_help="Start, watch and change a cluster.")
def cluster() -> None:
    """Start a cluster on this machine; watch and change any.

    What changes a cluster shows its plan and asks first, goes on without being watched, and can be
    stopped. Where there are API keys it takes one with `admin = true` (`agentmem key new --admin`).
    """


for _command in (
    join_token,
    join_tokens,
    revoke_token,
    move,
    drain,
    remove,
    rebalance,
    split,
    operations,
    stop,
    resume,
    check,
):
    cluster.add_command(_command)


@cluster.command()
@click.option("--nodes", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("agentmem-dev"),
    show_default=True,
    metavar="DIR",
)
@click.option("--port", type=click.IntRange(1, 65_535), default=7700, show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="For every node.")
def dev(nodes: int, data: Path, port: int, assignments: tuple[str, ...]) -> int:
    """Run a cluster of child processes on this machine until Ctrl-C.

    Node n1 answers HTTP on --port, n2 on the next, and so on; the links between nodes, with
    certificates that are made on the spot, use the ports 100 above. Logs are in
    DIR/n1/node.log and so on. Started again on the same DIR, it goes on with its data.

    \b
    agentmem cluster dev
    agentmem cluster dev --nodes 5 --data ./five --port 7800 --set node.log_level=debug
    """
    settings = _typed(assignments)
    made = DevCluster(data, nodes=nodes, port=port, settings=settings)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    code = Exit.OK
    try:
        made.start()
        _say(f"starting {nodes} {'node' if nodes == 1 else 'nodes'} ...")
        _wait_ready(made, stop)
        if not stop.is_set():
            for node in made.nodes:
                _say(f"{node.id}  {node.url}  pid {made.pid(node.id)}  log {node.log}")
            _say(f"ready: export AGENTMEM_URL={','.join(made.urls)}")
            _say("Ctrl-C stops all nodes")
        while not stop.wait(_CRASH_POLL_S):
            for crash in made.crashes():
                click.echo(str(crash), err=True)
            if not any(made.is_running(node.id) for node in made.nodes):
                click.echo("error: no node is left", err=True)
                code = Exit.FAILED
                break
    except DevClusterError as error:
        raise CommandFailed(str(error), Exit.FAILED) from error
    finally:
        # From here a second Ctrl-C must not leave children behind half stopped.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if stop.is_set():
            _say("stopping ...")
        killed = made.stop()
        if killed:
            click.echo(f"killed, for they did not stop in time: {', '.join(killed)}", err=True)
    return code


@cluster.command()
@click.option("--nodes", required=True, metavar="N1,N2,...", help="Ids of the nodes.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("certs"),
    show_default=True,
    metavar="DIR",
)
@click.option("--name", default="agentmem", show_default=True, help="`cluster.name` of the nodes.")
def certs(nodes: str, out: Path, name: str) -> None:
    """Make an authority and a certificate for each node, for the links between nodes.

    Give each node ca.crt and its own two files, and nobody ca.key: whoever has it can make nodes.
    Run again with more ids, it adds what is missing. Your own authority does as well: a node's
    certificate needs the URI agentmem://NAME/NODE as a subject alternative name.

    \b
    agentmem cluster certs --nodes n1,n2,n3 --out ./certs
    """
    from agentmem_cluster.link.ca import create_ca, issue

    ids = [part.strip() for part in nodes.split(",") if part.strip()]
    wrong = [one for one in ids if not re.fullmatch(_NODE_ID, one)]
    if wrong or not ids:
        raise click.UsageError(
            f"--nodes takes ids like n1,n2,n3, not {(wrong or [nodes])[0]!r}: small letters, "
            "digits and dashes."
        )
    try:
        create_ca(out, name)
        found = _cluster_of(out / "ca.crt")
        if found != name:
            raise click.UsageError(
                f"{out} holds the authority of the cluster {found!r}: say --name {found}, or "
                "choose another directory with --out."
            )
        for one in ids:
            issue(out, one)
    except OSError as error:
        raise CommandFailed(f"Cannot write to {out}: {error.strerror}.") from error
    for one in ids:
        click.echo(f"# node {one}, in its node.toml")
        click.echo(
            f'[cluster]\nname = "{name}"\nca_cert = "{out / "ca.crt"}"\n'
            f'cert = "{out / one}.crt"\nkey = "{out / one}.key"\n'
        )


def _cluster_of(ca_cert: Path) -> str:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    subject = x509.load_pem_x509_certificate(ca_cert.read_bytes()).subject
    return str(subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)


def _wait_ready(made: DevCluster, stop: threading.Event) -> None:
    deadline = time.monotonic() + 60.0
    while not stop.is_set():
        try:
            made.wait_ready(timeout_s=0.2)
            return
        except DevClusterError:
            # Over only when a node ended or a minute is: each turn looks whether Ctrl-C came.
            running = all(made.is_running(node.id) for node in made.nodes)
            if not running or time.monotonic() > deadline:
                raise


def _say(line: str) -> None:
    click.echo(line)


def _typed(assignments: tuple[str, ...]) -> dict[str, object]:
    """--set values with the types of their keys, checked before any node starts."""
    import msgspec

    from agentmem_node.config import ConfigError, load

    overrides = overrides_of(assignments)
    try:
        settings = load(overrides=overrides, environment={})
        values = {name: settings.explain(name).value for name in overrides}
    except ConfigError as error:
        raise CommandFailed(str(error), Exit.USAGE) from error
    return {name: msgspec.to_builtins(value) for name, value in values.items()}


@cluster.command()
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@connection_options
def status(
    watch: bool, url: str, api_key: str | None, timeout_s: float | None, as_json: bool
) -> int:
    """Nodes and shards: who leads, who is up, how far each replica is, what is under way.

    `digests`: whether replicas that have applied the same entries hold the same bytes; `-` when
    no two stand at the same entry just now. Operations are shown to admins.

    Exit code 0 when every node is ready, every shard has a leader and no digests differ, else 4.

    \b
    agentmem cluster status
    agentmem cluster status --watch --url http://127.0.0.1:7701
    """
    try:
        urls = seed_urls(url)
    except ValueError as error:
        raise click.UsageError(f"--url: {error}") from error
    if not watch or wants_json(as_json):
        state = ask(urls, api_key, timeout_s or 2.0)
        if wants_json(as_json):
            print_json(state.to_plain())
        else:
            console().print(render(state))
        return Exit.OK if state.is_healthy else Exit.UNAVAILABLE
    with Live(console=console(), auto_refresh=False) as live:
        while True:
            try:
                state = ask(urls, api_key, timeout_s or 2.0)
                # Nodes come and go: keep asking all that were ever seen.
                urls = list(dict.fromkeys([*urls, *(node.url for node in state.nodes)]))
                live.update(render(state), refresh=True)
            except client.TemporarilyUnavailable as error:
                live.update(failure(error).message, refresh=True)
            time.sleep(_WATCH_S)
