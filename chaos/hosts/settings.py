"""The settings of a node under test, as variables: what makes faults meet the interesting code.

Small segments and frequent checkpoints make the journal drop what a lagging replica needs, so
that replicas also recover by snapshot; few shards keep ten election timers off two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentmem_cluster.link.ca import create_ca, issue
from agentmem_node.config_keys import ApiKey

CLUSTER = "chaos"
SHARDS = 4
VECTOR_DIM = 16
_KEPT_OUT = "AGENTMEM_"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one node listens, and how it is told to reach the others.

    `peers` and `https` hold every node's link address and URL as this node knows them: a proxy's
    where there is one in between.
    """

    node: str
    folder: Path
    listen: str
    peer_listen: str
    peers: Mapping[str, str]
    urls: Mapping[str, str]

    @property
    def data(self) -> Path:
        return self.folder / "disk" / "data"


def certificates(folder: Path, nodes: tuple[str, ...]) -> None:
    create_ca(folder, CLUSTER)
    for node in nodes:
        issue(folder, node)


def environment(
    place: Place, authority: Path, api_key: str, extra: Mapping[str, str], *, joins: bool = False
) -> dict[str, str]:
    """The whole environment of a node: nothing set outside may change what is tested.

    A node that `joins` is told of the cluster by the cluster, and gets its certificate from it.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_KEPT_OUT)}
    nodes = {n: {"peer": place.peers[n], "http": place.urls[n]} for n in place.peers}
    key_hash = hashlib.sha256(api_key.encode()).hexdigest()
    key: dict[str, object] = {"tenant": "default", "id": "chaos", "key_hash": key_hash}
    if "admin" in ApiKey.__struct_fields__:
        key["admin"] = True  # shards are moved with the same key
    cluster = {
        "AGENTMEM_CLUSTER_SHARDS": str(SHARDS),
        "AGENTMEM_CLUSTER_NODES": json.dumps(nodes),
        "AGENTMEM_CLUSTER_CA_CERT": str(authority / "ca.crt"),
        "AGENTMEM_CLUSTER_CA_KEY": str(authority / "ca.key"),
        "AGENTMEM_CLUSTER_CERT": str(authority / f"{place.node}.crt"),
        "AGENTMEM_CLUSTER_KEY": str(authority / f"{place.node}.key"),
    }
    return {
        **kept,
        **({} if joins else cluster),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "AGENTMEM_NODE_ID": place.node,
        "AGENTMEM_NODE_DATA_DIR": str(place.data),
        "AGENTMEM_NODE_LISTEN": place.listen,
        "AGENTMEM_NODE_PEER_LISTEN": place.peer_listen,
        "AGENTMEM_NODE_LOG_FORMAT": "text",
        "AGENTMEM_CLUSTER_NAME": CLUSTER,
        "AGENTMEM_EMBEDDING_PROVIDER": "none",
        "AGENTMEM_EMBEDDING_DIM": str(VECTOR_DIM),
        "AGENTMEM_STORAGE_CHECKPOINT_MS": "2000",
        "AGENTMEM_STORAGE_JOURNAL_SEGMENT_BYTES": str(2 << 20),
        "AGENTMEM_LIMITS_DISK_FREE_BYTES_MIN": str(8 << 20),
        "AGENTMEM_SECURITY_API_KEYS": json.dumps([key]),
        **extra,
    }


def command() -> list[str]:
    return [sys.executable, "-m", "agentmem_node.cli.main", "serve"]
