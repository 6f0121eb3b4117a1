"""What a node of a development cluster says: that it is ready, whom it reaches, its log."""

from __future__ import annotations

import http.client
import os
import re

from agentmem_node.cli.devlayout import HOST, NodeFiles

_LOG_TAIL_BYTES = 2_000
_PROBE_S = 1.0


def is_ready(node: NodeFiles) -> bool:
    """Whether the node answers that it is ready."""
    connection = http.client.HTTPConnection(HOST, node.port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def peers_up(node: NodeFiles) -> set[str]:
    """The nodes that it has a link to now; none when it does not answer."""
    connection = http.client.HTTPConnection(HOST, node.port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return set()
    finally:
        connection.close()
    return set(re.findall(r'^agentmem_link_connected\{peer="([^"]+)"\} 1', text, re.MULTILINE))


def log_tail(node: NodeFiles) -> str:
    """The last lines that the node printed."""
    try:
        with node.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()
    except OSError:
        return ""
