"""`agentmem cluster join-token`, `join-tokens` and `revoke-token`."""

from __future__ import annotations

from typing import Any

import click
import pytest

from agentmem_node.cli.exits import Exit
from agentmem_node.service.join_tokens import JoinToken
from tests.api.conftest import KEPT


@pytest.fixture(autouse=True)
def _there(agentmem: Any, operators: Any) -> None:
    """The environment that `agentmem` clears is set by `operators` afterwards."""


def test_a_token_is_shown_with_what_to_do_with_it(agentmem: Any, operators: Any) -> None:
    made = agentmem("cluster", "join-token", "--ttl", "90s", "--uses", "3", terminal=True)
    assert made.code == Exit.OK, made.err
    assert made.out.startswith("amj_\n") and "lets 3 nodes in" in made.out
    assert f"its id is {'0' * 16}" in made.out
    assert f"serve --join TOKEN --at {operators.url} --id ID" in made.out
    wish = operators.seen[-1]
    assert (wish.ttl_s, wish.uses, wish.node) == (90, 3, None)
    agentmem("cluster", "join-token", "--node", "n4")
    assert operators.seen[-1].node == "n4"
    assert agentmem("cluster", "join-token", "--ttl", "soon").code == Exit.USAGE


def test_tokens_are_listed_with_whom_they_have_let_in(agentmem: Any) -> None:
    listed = agentmem("cluster", "join-tokens", terminal=True)
    assert listed.code == Exit.OK, listed.err
    heading, row = click.unstyle(listed.out).splitlines()
    assert heading.split() == ["TOKEN", "STATE", "UNTIL", "LETS", "IN", "HAS", "LET", "IN"]
    assert row.split() == [KEPT.id, "open", KEPT.expires_at, "2", "nodes", "n4"]
    assert agentmem("cluster", "join-tokens").json["tokens"][0]["joined"] == ["n4"]


def test_a_token_is_revoked_and_it_is_said_who_stays(agentmem: Any, operators: Any) -> None:
    revoked = agentmem("cluster", "revoke-token", KEPT.id, terminal=True)
    assert revoked.code == Exit.OK, revoked.err
    assert revoked.out == f"token {KEPT.id} is revoked\nit had let n4 in, which stays\n"
    assert operators.seen == [KEPT.id]
    assert agentmem("cluster", "revoke-token", KEPT.id).json["id"] == KEPT.id
    unknown = agentmem("cluster", "revoke-token", "0" * 16)
    assert unknown.code == Exit.NOT_FOUND and "no such join token" in unknown.err


def test_a_token_can_be_revoked_by_itself(agentmem: Any, operators: Any) -> None:
    token = str(JoinToken(KEPT.id, b"s" * 32))
    assert agentmem("cluster", "revoke-token", token).code == Exit.OK
    assert agentmem("cluster", "revoke-token", f" {token}\n").code == Exit.OK
    assert operators.seen == [KEPT.id, KEPT.id], "its secret went nowhere"
    for torn in (token[:-1], token.removeprefix("amj_"), token.upper(), "../x"):
        refused = agentmem("cluster", "revoke-token", torn)
        assert refused.code == Exit.USAGE and "An id is 16 hexadecimal digits" in refused.err
    assert len(operators.seen) == 2
