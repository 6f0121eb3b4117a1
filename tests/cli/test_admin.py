"""An operation that was just begun is not unknown because one node has not heard of it."""

from __future__ import annotations

from typing import Any

import pytest

import agentmem_client as client
from agentmem_node.cli.admin import Admin
from agentmem_node.model import operations as ops

BEGUN = {
    "id": "move-1",
    "wish": {"kind": "rebalance"},
    "state": "running",
    "created_at": "2026-01-01T00:00:00Z",
    "steps": [],
    "message": "",
    "by": "anybody",
}


class Late:
    """A connection to a cluster of which the second node that is asked has not heard of it."""

    def run(self, call: Any) -> Any:
        if call.method == "POST":
            return call.read(BEGUN)
        raise client.NotFound("There is no operation 'move-1'.")


def test_a_node_that_has_not_heard_of_what_was_just_begun_is_no_error() -> None:
    admin = Admin(Late())  # type: ignore[arg-type]
    with pytest.raises(client.NotFound):
        admin.operation("move-1")
    begun = admin.begin(ops.OperationWish(kind="rebalance"))
    assert admin.operation("move-1") == begun
    with pytest.raises(client.NotFound):
        admin.operation("move-2")
