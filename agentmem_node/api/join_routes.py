"""The routes by which nodes join."""

from __future__ import annotations

from agentmem_cluster.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    InvalidField,
    NoQuorum,
    NotFound,
    NotLeader,
    TooLarge,
    Unavailable,
)
from agentmem_node.api import joining, shapes
from agentmem_node.api.route import BASE, COMMON, Errors, Route, make_route
from agentmem_node.service import join_messages as jm

_ASK: Errors = (InvalidField, NoQuorum, NotLeader, Unavailable, DeadlineExceeded)
_META: Errors = (BadRequest, TooLarge, Conflict, *_ASK)
# Strangers may send one: it holds a certificate request and some addresses.
_JOIN_BYTES_MAX = 16 * 1024

JOIN_ROUTES: tuple[Route, ...] = (
    make_route(
        "POST",
        f"{BASE}/cluster/join-tokens",
        joining.make_join_token,
        "admin",
        "Make a token with which nodes may join",
        description="`agentmem cluster join-token` sends it. The token is in the answer and "
        "nowhere else.",
        tag="cluster",
        needs_admin=True,
        body=jm.JoinTokenRequest,
        answer=jm.JoinTokenMade,
        status=201,
        errors=_META,
        example={"ttl_s": 3600, "uses": 1},
    ),
    make_route(
        "GET",
        f"{BASE}/cluster/join-tokens",
        joining.list_join_tokens,
        "admin",
        "Join tokens, and whom they have let in",
        description="Each is listed until a day after its end, and without its secret.",
        tag="cluster",
        needs_admin=True,
        answer=shapes.JoinTokenList,
        errors=_ASK,
    ),
    make_route(
        "DELETE",
        f"{BASE}/cluster/join-tokens/{{id}}",
        joining.revoke_join_token,
        "admin",
        "Revoke a join token",
        description="Nobody joins with it any more. Nodes that it has let in stay: see `joined`.",
        tag="cluster",
        needs_admin=True,
        answer=jm.JoinTokenKept,
        id_meaning="The token's id.",
        errors=(*_ASK, NotFound),
    ),
    make_route(
        "POST",
        f"{BASE}/cluster/join",
        joining.join,
        "read",
        "Join the cluster",
        description="`agentmem serve --join` sends it. The token is all that it needs, and never "
        "travels: both sides prove that they have it.",
        tag="cluster",
        body=jm.JoinRequest,
        body_bytes_max=_JOIN_BYTES_MAX,
        answer=jm.JoinAnswer,
        errors=(*_META, *COMMON),
        is_open=True,
        example={"token_id": "0" * 16, "payload": "{...}", "proof": "0" * 64},
    ),
)
