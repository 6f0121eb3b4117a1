"""What a node that joins and its cluster say to each other, and what makes a token."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from agentmem_node.config_keys import NodeId

TTL_S_MAX: Final = 7 * 24 * 3600
USES_MAX: Final = 100
_PEM_CHARS_MAX: Final = 4_096
_ADDRESS_CHARS_MAX: Final = 300

Text = Annotated[str, Meta(max_length=64)]
Address = Annotated[str, Meta(min_length=1, max_length=_ADDRESS_CHARS_MAX)]


class JoinTokenRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """For how long, for how many nodes and for which one a token is."""

    ttl_s: Annotated[
        int, Meta(ge=1, le=TTL_S_MAX, description="Seconds for which it can be used.")
    ] = 3_600
    uses: Annotated[
        int, Meta(ge=1, le=USES_MAX, description="How many nodes may join with it.")
    ] = 1
    node: Annotated[
        NodeId | None,
        Meta(
            description="The only id that it lets in. Needed to give the id of a lost node to a "
            "new disk."
        ),
    ] = None


class JoinTokenMade(msgspec.Struct, kw_only=True):
    """The token is shown only now: the cluster keeps what checks it, not the token."""

    token: str
    id: Annotated[str, Meta(description="Names it in logs, and to revoke it; no secret.")]
    expires_at: str
    uses: int
    node: str | None


class JoinTokenKept(msgspec.Struct, kw_only=True):
    """A token without its secret, which the cluster does not have."""

    id: str
    state: Literal["open", "used_up", "expired"]
    expires_at: str
    uses: Annotated[int, Meta(description="How many nodes may join with it.")]
    node: Annotated[str | None, Meta(description="The only id that it lets in.")]
    joined: Annotated[list[str], Meta(description="Whom it has let in so far.")]


class JoinRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A node's request for a place and a certificate. `agentmem serve --join` makes it."""

    token_id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    payload: Annotated[
        str,
        Meta(
            max_length=12_000,
            description="JSON: node, csr, peer, http, zone, version, level, incarnation, nonce.",
        ),
    ]
    proof: Annotated[
        str,
        Meta(
            pattern="^[0-9a-f]{64}$",
            description="HMAC-SHA256 over the payload with a key made from the token's secret.",
        ),
    ]


class JoinAnswer(msgspec.Struct, kw_only=True):
    """What a node needs to be of the cluster, and the proof that it comes from this cluster."""

    payload: Annotated[
        str,
        Meta(
            description="JSON: cluster, cluster_id, node, ca_cert, certificate, peers, model, "
            "settings."
        ),
    ]
    proof: Annotated[str, Meta(description="HMAC-SHA256 over the request's nonce and the payload.")]


class Wish(msgspec.Struct, kw_only=True):
    """The payload of a request. `incarnation` names the disk that joins.

    `csr` is empty when the node has a certificate of the cluster's authority already.
    """

    node: NodeId
    csr: Annotated[str, Meta(max_length=_PEM_CHARS_MAX)]
    peer: Address
    http: Address
    zone: Text
    version: Text
    level: Annotated[int, Meta(ge=1, le=1_000_000)]
    incarnation: Annotated[str, Meta(pattern="^[0-9a-f]{16,64}$")]
    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{32,64}$")]


class Place(msgspec.Struct, kw_only=True):
    """Where a node is reached."""

    peer: str
    http: str


class Welcome(msgspec.Struct, kw_only=True):
    """The payload of an answer. `model`: name, dimension, hash. `settings`: SHARED_SETTINGS.

    `certificate` is empty when none was asked for.
    """

    cluster: str
    cluster_id: str
    node: str
    ca_cert: str
    certificate: str
    peers: dict[str, Place]
    model: tuple[str, int, str]
    settings: dict[str, Any]


# What all nodes of a cluster must, or had better, have alike.
SHARED_SETTINGS: Final = (
    "cluster.shards",
    "cluster.replication_factor",
    "embedding.provider",
    "embedding.dim",
    "raft.heartbeat_ms",
    "raft.election_ms_min",
    "raft.election_ms_max",
)
