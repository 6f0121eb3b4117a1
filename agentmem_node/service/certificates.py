"""The certificates that a member of a cluster shows to the others, or why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentmem_cluster.link.tls import LinkTls
from agentmem_node.config import ConfigError
from agentmem_node.config_keys import ClusterSection

if TYPE_CHECKING:
    from agentmem_cluster.link.ca import Authority


def load_certificates(cluster: ClusterSection, node_id: str) -> LinkTls:
    """The files that `cluster.ca_cert`, `.cert` and `.key` name. Raises ConfigError."""
    if cluster.ca_cert is None or cluster.cert is None or cluster.key is None:
        raise ConfigError(
            "The nodes of a cluster know each other by certificates, and none are configured. "
            "Make them with `agentmem cluster certs --out DIR --nodes "
            f"{','.join(cluster.nodes)}` and set cluster.ca_cert, cluster.cert and cluster.key."
        )
    files = {"ca_cert": cluster.ca_cert, "cert": cluster.cert, "key": cluster.key}
    for name, file in files.items():
        try:
            Path(file).open("rb").close()
        except OSError as error:
            raise ConfigError(
                f"Cannot read cluster.{name}, {file}: {error.strerror}. `agentmem cluster certs` "
                "makes certificates."
            ) from error
    try:
        return LinkTls.load(
            ca_cert=Path(cluster.ca_cert),
            cert=Path(cluster.cert),
            key=Path(cluster.key),
            cluster=cluster.name,
            node_id=node_id,
        )
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{cluster.ca_cert}, {cluster.cert} and {cluster.key} are not an authority, a "
            f"certificate and its key in PEM: {error}."
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_authority(cluster: ClusterSection) -> Authority | None:
    """What signs the certificates of nodes that join; None without `cluster.ca_key`.

    Raises ConfigError.
    """
    if cluster.ca_key is None:
        return None
    # Imported here: most nodes sign nothing, and the package is a heavy one.
    from agentmem_cluster.link.ca import Authority

    if cluster.ca_cert is None:
        raise ConfigError("cluster.ca_key is the key of cluster.ca_cert, which is not set.")
    try:
        return Authority.load(cluster.ca_cert, cluster.ca_key)
    except OSError as error:
        raise ConfigError(
            f"Cannot read {error.filename}: {error.strerror}. Correct cluster.ca_key, or leave it "
            "out: nodes can join as long as one node has it."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"cluster.ca_key and cluster.ca_cert are no authority: {error}."
        ) from error
