"""The certificates that a member of a cluster shows to the others, or why it cannot."""

from __future__ import annotations

from pathlib import Path

from agentmem_cluster.link.tls import LinkTls
from agentmem_node.config import ConfigError
from agentmem_node.config_keys import ClusterSection


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
