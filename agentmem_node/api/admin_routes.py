"""The routes for operators who change a cluster."""

from __future__ import annotations

from typing import Any

from agentmem_cluster.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DiskFull,
    InvalidField,
    NoQuorum,
    NotFound,
    NotLeader,
    TooLarge,
    Unavailable,
)
from agentmem_node.api import cluster_admin, shapes
from agentmem_node.api.route import BASE, Errors, Route, make_route
from agentmem_node.model import operations as ops

_ASK: Errors = (InvalidField, Unavailable, NoQuorum, NotLeader, DeadlineExceeded)
_WISH: Errors = (BadRequest, TooLarge, NotFound, Conflict, *_ASK)
_EXAMPLE: dict[str, Any] = {"kind": "move", "shard": "s03", "node": "n4"}
_SHARED: dict[str, Any] = {"needs_admin": True, "tag": "cluster"}
_ONE: dict[str, Any] = {**_SHARED, "answer": ops.Operation, "id_meaning": "The operation's id."}

ADMIN_ROUTES: tuple[Route, ...] = (
    make_route(
        "POST",
        f"{BASE}/cluster/plan",
        cluster_admin.plan_operation,
        "admin",
        "What a move, drain, removal, rebalancing or split would do",
        description="Changes nothing. `steps` is empty when there is nothing to do.",
        body=ops.OperationWish,
        answer=ops.OperationPlan,
        errors=_WISH,
        example=_EXAMPLE,
        **_SHARED,
    ),
    make_route(
        "POST",
        f"{BASE}/cluster/operations",
        cluster_admin.begin_operation,
        "admin",
        "Begin a move, drain, removal, rebalancing or split",
        description="It is planned anew and stored in the cluster before the answer comes; it "
        "goes on whichever node fails, and whether or not anybody asks for it. Each shard changes "
        "hands as a whole or not at all, and serves throughout, but for a short wait of writes.",
        body=ops.OperationWish,
        status=202,
        is_once=True,
        errors=(*_WISH, DiskFull),
        example=_EXAMPLE,
        **{**_SHARED, "answer": ops.Operation},
    ),
    make_route(
        "GET",
        f"{BASE}/cluster/operations",
        cluster_admin.list_operations,
        "admin",
        "Operations, newest first",
        description="With their progress, those that the cluster began by itself included.",
        answer=shapes.OperationList,
        errors=_ASK,
        **_SHARED,
    ),
    make_route(
        "GET",
        f"{BASE}/cluster/operations/{{id}}",
        cluster_admin.get_operation,
        "admin",
        "One operation and its progress",
        errors=(*_ASK, NotFound),
        **_ONE,
    ),
    make_route(
        "POST",
        f"{BASE}/cluster/operations/{{id}}/stop",
        cluster_admin.stop_operation,
        "admin",
        "Stop an operation",
        description="Steps that are not begun stay undone. The one under way ends whole: its new "
        "members serve, or the old ones go on.",
        errors=(*_ASK, NotFound, Conflict, DiskFull),
        **_ONE,
    ),
    make_route(
        "POST",
        f"{BASE}/cluster/operations/{{id}}/resume",
        cluster_admin.resume_operation,
        "admin",
        "Go on with an operation that was stopped, or failed",
        description="Steps that failed are tried again.",
        errors=(*_ASK, NotFound, Conflict, DiskFull),
        **_ONE,
    ),
    make_route(
        "GET",
        f"{BASE}/cluster/check",
        cluster_admin.check_cluster,
        "admin",
        "Whether everything holds that must hold of the cluster",
        description="One finding for each invariant. 200 also when one is broken: see `ok`.",
        answer=shapes.CheckResult,
        errors=_ASK,
        **_SHARED,
    ),
)
