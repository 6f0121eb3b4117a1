"""The files and ports of a development cluster: what `cluster dev` prepares before it starts nodes.

DIR/dev.json            how many nodes there are: replica groups never change members
DIR/ca/                 the development authority and a certificate for each node
DIR/n1/node.toml        written anew at every start
DIR/n1/node.log         everything the node printed, appended
DIR/n1/data/            the node's data directory
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem_node.config_file import to_toml

HOST = "127.0.0.1"
# The link's port of a node is its HTTP port and this.
PEER_PORT_OFFSET = 100
NODES_MAX = PEER_PORT_OFFSET
_HEADING = "Written by `agentmem cluster dev` at every start; `--set SECTION.KEY=VALUE` changes it."
_PORT_ATTEMPTS = 50
_PORTS_FREE_FROM = 20_000
_PORTS_FREE_TO = 31_000  # below the ranges from which systems take ports for outgoing connections


class DevClusterError(Exception):
    """The cluster cannot be started as asked; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """One node's place."""

    id: str
    directory: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def peer(self) -> str:
        return f"{HOST}:{self.port + PEER_PORT_OFFSET}"

    @property
    def config(self) -> Path:
        return self.directory / "node.toml"

    @property
    def log(self) -> Path:
        return self.directory / "node.log"


def layout(data: Path, nodes: int, port: int) -> tuple[NodeFiles, ...]:
    """n1, n2, ... on consecutive ports. Raises DevClusterError."""
    if not 1 <= nodes <= NODES_MAX:
        raise DevClusterError(f"A development cluster has 1 to {NODES_MAX} nodes, not {nodes}.")
    last = port + nodes - 1 + PEER_PORT_OFFSET
    if port < 1 or last > 65_535:
        raise DevClusterError(f"Ports {port} to {last} are needed; they must be 1 to 65535.")
    return tuple(NodeFiles(f"n{i + 1}", data / f"n{i + 1}", port + i) for i in range(nodes))


Dialled = Callable[[str, NodeFiles], str]
"""(a node's id, another node) -> HOST:PORT at which the first dials the second."""


def prepare(
    data: Path,
    nodes: tuple[NodeFiles, ...],
    name: str,
    settings: Mapping[str, Any],
    dialled: Dialled | None = None,
) -> None:
    """Write all files. `settings`: `{"raft.heartbeat_ms": 50}`, for every node.

    `dialled` None: nodes reach each other where they listen. Raises DevClusterError when `data`
    holds a cluster of another size, OSError.
    """
    data.mkdir(parents=True, exist_ok=True)
    _check_size(data, len(nodes))
    tls = _certificates(data / "ca", name, nodes) if len(nodes) > 1 else {}
    for node in nodes:
        node.directory.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "node.log_format": "text",
            **settings,
            "node.id": node.id,
            "node.data_dir": str((node.directory / "data").absolute()),
            "node.listen": f"{HOST}:{node.port}",
            "cluster.name": name,
            **tls.get(node.id, {}),
        }
        if len(nodes) > 1:
            values["cluster.nodes"] = {
                n.id: {
                    "peer": n.peer if dialled is None or n is node else dialled(node.id, n),
                    "http": n.url,
                }
                for n in nodes
            }
        node.config.write_text(to_toml(_HEADING, values))


def _check_size(data: Path, nodes: int) -> None:
    path = data / "dev.json"
    try:
        found = json.loads(path.read_text())["nodes"]
    except FileNotFoundError:
        path.write_text(json.dumps({"nodes": nodes}) + "\n")
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DevClusterError(
            f"{path} cannot be read ({error}). Choose another directory with --data."
        ) from error
    if found != nodes:
        raise DevClusterError(
            f"{data} holds a cluster of {found} nodes. Start it with --nodes {found}, or choose "
            "another directory with --data."
        )


def _certificates(
    directory: Path, cluster: str, nodes: tuple[NodeFiles, ...]
) -> dict[str, dict[str, str]]:
    # Imported here: making certificates needs a heavy package, a single node needs none.
    from agentmem_cluster.link.ca import create_ca, issue

    create_ca(directory, cluster)
    made: dict[str, dict[str, str]] = {}
    folder = directory.absolute()
    for node in nodes:
        issue(directory, node.id)
        made[node.id] = {
            "cluster.ca_cert": str(folder / "ca.crt"),
            "cluster.cert": str(folder / f"{node.id}.crt"),
            "cluster.key": str(folder / f"{node.id}.key"),
            "cluster.ca_key": str(folder / "ca.key"),
        }
    return made


def ports_in_use(nodes: tuple[NodeFiles, ...]) -> list[int]:
    """The ports of `nodes` that something listens on already."""
    peers = [node.port + PEER_PORT_OFFSET for node in nodes] if len(nodes) > 1 else []
    return [port for port in [*(node.port for node in nodes), *peers] if not is_free(port)]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the node binds it: a port that merely waits for late packets is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def place_of_newcomer(data: Path, nodes: tuple[NodeFiles, ...]) -> NodeFiles:
    """Where the next node of a running cluster goes, under the next id, on free ports."""
    number = max(int(node.id.removeprefix("n")) for node in nodes) + 1
    taken = {node.port for node in nodes}
    while (port := free_port(1)) in taken or port - PEER_PORT_OFFSET in taken:
        pass
    return NodeFiles(f"n{number}", data / f"n{number}", port)


def free_port(nodes: int) -> int:
    """A first port from which a cluster of `nodes` can be started."""
    for _ in range(_PORT_ATTEMPTS):
        port = random.randrange(_PORTS_FREE_FROM, _PORTS_FREE_TO)
        if not ports_in_use(layout(Path(), nodes, port)):
            return port
    raise DevClusterError(f"No {nodes} free ports in a row were found on {HOST}.")
