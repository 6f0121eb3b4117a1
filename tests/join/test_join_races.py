"""A token that is revoked by the next leader while this one lets a node in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from agentmem_cluster.errors import NotFound, Unavailable
from agentmem_cluster.link.ca import request_certificate
from agentmem_cluster.meta import MetaState, Outcome
from agentmem_cluster.realtime import RealClock, RealRng
from agentmem_node.config import load
from agentmem_node.service.join_messages import JoinRequest
from agentmem_node.service.join_server import Joins
from agentmem_node.service.join_tokens import (
    KEPT_UNDER,
    JoinToken,
    KeptToken,
    proof_of_request,
)


class Meta:
    """What is decided, as the meta group's leader sees it."""

    def __init__(self) -> None:
        self.state = MetaState()
        self.proposed: list[bytes] = []
        self.leads = True
        self.nodes: list[str] = []

    async def read_state(self) -> MetaState:
        return self.state

    async def propose_here(self, command: bytes) -> Outcome:
        self.proposed.append(command)
        return Outcome("ok", "")


def a_request(token: JoinToken, tmp_path: Path) -> JoinRequest:
    payload = json.dumps(
        {
            "node": "n4",
            "csr": request_certificate(tmp_path / "n4.key", "n4"),
            "peer": "127.0.0.1:7804",
            "http": "http://127.0.0.1:7704",
            "zone": "",
            "version": "0.1.0",
            "level": 1,
            "incarnation": "a" * 24,
            "nonce": "b" * 32,
        }
    )
    proof = proof_of_request(token.key, payload)
    return JoinRequest(token_id=token.id, payload=payload, proof=proof)


def test_a_token_that_is_revoked_while_a_certificate_is_signed_lets_nobody_in(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        meta, token, clock = Meta(), JoinToken.draw(RealRng()), RealClock()
        kept = KeptToken(token.key, clock.wall_ms() + 60_000, None, 2, {})
        meta.state.kv[KEPT_UNDER + token.id] = kept.to_bytes()

        async def sign(*_: object, **__: object) -> str:
            del meta.state.kv[KEPT_UNDER + token.id]  # by whoever leads meanwhile
            return "a certificate"

        link: Any = SimpleNamespace(
            peers_up=lambda: ["n2"], call=sign, is_up=lambda _: False, register=None
        )
        joins = Joins(
            load(environment={}).config,
            membership=cast("Any", meta),
            link=link,
            clock=clock,
            rng=RealRng(),
            authority=None,
        )
        with pytest.raises(Unavailable, match="changed meanwhile"):
            await joins.join(msgspec.convert(a_request(token, tmp_path), JoinRequest))
        assert meta.proposed == [], "neither the token nor the node is known again"
        with pytest.raises(NotFound):
            await joins.revoke_token(token.id)

    asyncio.run(scenario())
