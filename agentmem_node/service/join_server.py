"""How a cluster lets a node in: tokens are made, requests are checked, certificates are signed.

The leader of the meta group decides, one request at a time, so that a token is used as often as
it may be and no more. Any node takes a request and brings it there. Whoever has the authority's
key signs; the leader finds one that has it. Before the answer the meta group knows the newcomer:
then every node's link accepts it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    Conflict,
    InvalidField,
    NotFound,
    Overloaded,
    Unauthorized,
    Unavailable,
)
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import MetaState, NodeInfo, Outcome, kv_delete, kv_put, put_node
from agentmem_cluster.runtime import Clock, Rng
from agentmem_node.config import Config, ConfigError, split_address
from agentmem_node.model.times import format_ms
from agentmem_node.service.join_messages import (
    SHARED_SETTINGS,
    JoinAnswer,
    JoinRequest,
    JoinTokenKept,
    JoinTokenMade,
    JoinTokenRequest,
    Place,
    Welcome,
    Wish,
)
from agentmem_node.service.join_tokens import (
    KEPT_UNDER,
    Joined,
    JoinToken,
    KeptToken,
    is_proof,
    proof_of_answer,
    proof_of_request,
)
from agentmem_node.service.membership import Membership
from agentmem_node.service.view import NODE_STATE

if TYPE_CHECKING:
    from agentmem_cluster.link.ca import Authority

log = logging.getLogger("agentmem.join")

_CALL_S: Final = 8.0
_SIGN_S: Final = 3.0
_TOKENS_MAX: Final = 256
REMOVED: Final = b"removed"  # as `agentmem cluster remove` leaves it under NODE_STATE
# Requests to join that one node takes: strangers may send them, and a signature costs a little.
_BURST_MAX: Final = 20.0
_PER_S: Final = 2.0


class Joins:
    """`serve` registers its calls with the link; use on one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        membership: Membership,
        link: Link | None,
        clock: Clock,
        rng: Rng,
        authority: Authority | None,
    ) -> None:
        self._config = config
        self._node_id = config.node.id
        self._membership = membership
        self._link = link
        self._clock = clock
        self._rng = rng
        self._authority = authority
        self._admitting = asyncio.Lock()
        self._allowance = _BURST_MAX
        self._allowed_at = clock.monotonic()

    def serve(self) -> None:
        if self._link is not None:
            self._link.register("join.keep", self._on_keep)
            self._link.register("join.list", self._on_list)
            self._link.register("join.revoke", self._on_revoke)
            self._link.register("join.admit", self._on_admit)
            self._link.register("join.sign", self._on_sign)

    # -- what the API asks ----------------------------------------------------------------

    async def make_token(self, wish: JoinTokenRequest) -> JoinTokenMade:
        """Raises Conflict on a node that runs alone, Overloaded, Unavailable."""
        if self._link is None:
            raise Conflict(
                "This node runs alone, without a link to others: nobody can join it.",
                hint="Make certificates with `agentmem cluster certs`, give it a [cluster.nodes] "
                "with itself as the only entry, and restart it.",
            )
        token = JoinToken.draw(self._rng)
        expires_ms = self._clock.wall_ms() + wish.ttl_s * 1000
        kept = KeptToken(token.key, expires_ms, wish.node, wish.uses, {})
        body = {"id": token.id, "kept": kept.to_bytes()}
        await self._at_leader("join.keep", self._on_keep, body)
        log.info("join token %s was made, for %d s and %s", token.id, wish.ttl_s, _whom(kept))
        return JoinTokenMade(
            token=str(token),
            id=token.id,
            expires_at=format_ms(expires_ms),
            uses=wish.uses,
            node=wish.node,
        )

    async def tokens(self) -> list[JoinTokenKept]:
        """Every token of the last day, the one that ends last first. Raises Unavailable."""
        found = await self._at_leader("join.list", self._on_list, {})
        return msgspec.convert(found, list[JoinTokenKept])

    async def revoke_token(self, token_id: str) -> JoinTokenKept:
        """Forget a token; nodes that it has let in stay. Raises NotFound, Unavailable."""
        found = await self._at_leader("join.revoke", self._on_revoke, {"id": token_id})
        return msgspec.convert(found, JoinTokenKept)

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """Let a node in. Raises Unauthorized, Forbidden, Conflict, BadRequest, Unavailable."""
        now = self._clock.monotonic()
        self._allowance = min(_BURST_MAX, self._allowance + (now - self._allowed_at) * _PER_S)
        self._allowed_at = now
        if self._allowance < 1:
            raise Overloaded("This node was asked to let nodes in too often.", hint="Retry soon.")
        self._allowance -= 1
        body = msgspec.to_builtins(request)
        answer = await self._at_leader("join.admit", self._on_admit, body)
        return msgspec.convert(answer, JoinAnswer)

    async def _at_leader(
        self,
        method: str,
        handler: Callable[[str, dict[str, Any]], Awaitable[Any]],
        body: dict[str, Any],
    ) -> Any:
        if self._membership.leads:
            return await handler(self._node_id, body)
        return await self._membership.ask_leader(method, body, _CALL_S)

    # -- what the leader does -------------------------------------------------------------

    async def _on_keep(self, _peer: str, body: dict[str, Any]) -> None:
        """`join.keep`: remember a token; forget those that ended long ago."""
        async with self._admitting:
            tokens = _tokens_of(await self._membership.read_state())
            now_ms = self._clock.wall_ms()
            for token_id in [one for one, kept in tokens.items() if kept.is_forgotten(now_ms)]:
                await self._propose(kv_delete(KEPT_UNDER + token_id))
                del tokens[token_id]
            if len(tokens) >= _TOKENS_MAX:
                raise Overloaded(
                    f"There are {_TOKENS_MAX} join tokens already.",
                    hint="Each is forgotten a day after its end, or once it is revoked: `agentmem "
                    "cluster revoke-token`.",
                )
            KeptToken.from_bytes(body["kept"])
            await self._propose(kv_put(KEPT_UNDER + str(body["id"]), body["kept"]))

    async def _on_list(self, _peer: str, _body: dict[str, Any]) -> list[dict[str, Any]]:
        """`join.list`: the tokens, without what checks them."""
        tokens, now_ms = _tokens_of(await self._membership.read_state()), self._clock.wall_ms()
        newest_first = sorted(tokens.items(), key=lambda one: (-one[1].expires_ms, one[0]))
        return [
            _shown(token_id, kept, now_ms)
            for token_id, kept in newest_first
            if not kept.is_forgotten(now_ms)
        ]

    async def _on_revoke(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`join.revoke`: in turn with those who join, so that each came before it or is refused."""
        token_id = str(body["id"])
        async with self._admitting:
            kept = _tokens_of(await self._membership.read_state()).get(token_id)
            if kept is None:
                raise NotFound(
                    f"There is no join token {token_id!r}.",
                    hint="It may be revoked already: see `agentmem cluster join-tokens`.",
                )
            await self._propose(kv_delete(KEPT_UNDER + token_id))
        log.info("join token %s was revoked", token_id)
        return _shown(token_id, kept, self._clock.wall_ms())

    async def _on_admit(self, _peer: str, body: dict[str, Any]) -> dict[str, str]:
        """`join.admit`: check a request, sign, register the node, answer."""
        request = msgspec.convert(body, JoinRequest)
        async with self._admitting:
            state = await self._membership.read_state()
            kept = _tokens_of(state).get(request.token_id)
            if kept is None or not is_proof(
                proof_of_request(kept.key, request.payload), request.proof
            ):
                raise Unauthorized(
                    "This cluster has no such join token.",
                    hint="It was made by another cluster, was revoked, or ended more than a day "
                    "ago. Make one here with `agentmem cluster join-token`.",
                )
            wish = _read_wish(request.payload)
            who = Joined(_key_hash(wish), wish.incarnation)
            used = kept.after(wish.node, who, self._clock.wall_ms())
            self._place_of(wish, kept, state)  # nothing is signed for an id that is taken
            certificate = await self._sign(wish) if wish.csr else ""
            state = await self._membership.read_state()
            if _tokens_of(state).get(request.token_id) != kept:  # by another leader, meanwhile
                raise Unavailable("The join token has changed meanwhile.", hint="Ask again.")
            info = self._place_of(wish, kept, state)
            # The use is written before the node is known: never one use too many.
            if used != kept:
                await self._propose(kv_put(KEPT_UNDER + request.token_id, used.to_bytes()))
            if state.nodes.get(wish.node) != info:
                await self._propose(put_node(wish.node, info))
            if state.kv.get(NODE_STATE + wish.node) == REMOVED:
                await self._propose(kv_delete(NODE_STATE + wish.node))
            log.info("node %s joins with token %s", wish.node, request.token_id)
        await self._membership.tell_all()
        payload = msgspec.json.encode(self._welcome(wish, certificate)).decode()
        return {"payload": payload, "proof": proof_of_answer(kept.key, wish.nonce, payload)}

    async def _propose(self, command: bytes) -> None:
        outcome: Outcome = await self._membership.propose_here(command)
        if not outcome.ok:
            raise Unavailable(f"The meta group refused: {outcome.status} {outcome.message}".strip())

    def _place_of(self, wish: Wish, kept: KeptToken, state: MetaState) -> NodeInfo:
        """What the meta group shall know of the node. Raises Conflict when its id is taken."""
        assert self._link is not None
        node, known = wish.node, state.nodes.get(wish.node)
        incarnation = wish.incarnation
        if state.kv.get(NODE_STATE + node) == REMOVED:
            if kept.node != node:
                raise Conflict(
                    f"Node {node} was removed from this cluster.",
                    hint="Join with another --id, or make a token with `agentmem cluster "
                    f"join-token --node {node}`.",
                )
            # Every epoch in which its old self voted has ended: that is what removing means.
            return NodeInfo(
                wish.peer, wish.http, wish.version, wish.incarnation, wish.zone, wish.level
            )
        is_of_cluster = known is not None or node in self._membership.nodes
        if is_of_cluster and (known is None or known.incarnation != wish.incarnation):
            if node == self._node_id or self._link.is_up(node):
                raise Conflict(
                    f"This cluster has a node {node}, and it is up.",
                    hint="Join with another --id.",
                )
            if kept.node != node:
                raise Conflict(
                    f"This cluster has a node {node} with another disk.",
                    hint="Join with another --id. If that disk is lost for good, make a token "
                    f"with `agentmem cluster join-token --node {node}`.",
                )
            # Under the incarnation that the cluster knows. The node itself says that it has
            # another one, once it has closed every epoch in which its old self may have voted.
            incarnation = "" if known is None else known.incarnation
        return NodeInfo(wish.peer, wish.http, wish.version, incarnation, wish.zone, wish.level)

    def _welcome(self, wish: Wish, certificate: str) -> Welcome:
        view = self._membership.require_view()
        cluster = self._config.cluster
        assert cluster.ca_cert is not None  # there is a link
        peers = {
            name: Place(peer=peer, http=view.nodes[name].http if name in view.nodes else "")
            for name, peer in self._membership.peers.items()
        }
        peers[wish.node] = Place(peer=wish.peer, http=wish.http)
        model = view.model
        return Welcome(
            cluster=cluster.name,
            cluster_id=view.cluster_id,
            node=wish.node,
            ca_cert=Path(cluster.ca_cert).read_text(),
            certificate=certificate,
            peers=peers,
            model=(model.name, model.dim, model.model_hash),
            settings={name: self._setting(name) for name in SHARED_SETTINGS},
        )

    def _setting(self, name: str) -> Any:
        section, _, key = name.partition(".")
        return getattr(getattr(self._config, section), key)

    # -- signing --------------------------------------------------------------------------

    async def _sign(self, wish: Wish) -> str:
        """Here, or by a node that has the authority's key. Raises Conflict when none has."""
        body = {"node": wish.node, "csr": wish.csr}
        if self._authority is not None:
            return await self._on_sign(self._node_id, body)
        assert self._link is not None
        for peer in self._link.peers_up():
            try:
                return str(await self._link.call(peer, "join.sign", body, timeout=_SIGN_S))
            except AgentMemError as error:
                log.debug("node %s does not sign: %s", peer, error)
        raise Conflict(
            "No node that is up has the key of the cluster's authority, to sign the certificate.",
            hint="Set cluster.ca_key on one of them and restart it (`agentmem cluster certs` made "
            "it as ca.key), or give the new node a certificate of its own with cluster.ca_cert, "
            "cluster.cert and cluster.key.",
        )

    async def _on_sign(self, _peer: str, body: dict[str, Any]) -> str:
        """`join.sign`: asked by the leader, which has checked the token."""
        if self._authority is None:
            raise NotFound(f"Node {self._node_id} has no cluster.ca_key.")
        try:
            return self._authority.sign_request(
                self._config.cluster.name, str(body["node"]), str(body["csr"]), clock=self._clock
            )
        except ValueError as error:
            raise BadRequest(f"The certificate request is not one: {error}.") from error


def _tokens_of(state: MetaState) -> dict[str, KeptToken]:
    found = {}
    for key, value in state.kv.items():
        if key.startswith(KEPT_UNDER):
            try:
                found[key.removeprefix(KEPT_UNDER)] = KeptToken.from_bytes(value)
            except ValueError as error:
                log.warning("%s: %s", key, error)
    return found


def _shown(token_id: str, kept: KeptToken, now_ms: int) -> dict[str, Any]:
    shown = JoinTokenKept(
        id=token_id,
        state=kept.state(now_ms),
        expires_at=format_ms(kept.expires_ms),
        uses=kept.uses,
        node=kept.node,
        joined=sorted(kept.joined),
    )
    found: dict[str, Any] = msgspec.to_builtins(shown)
    return found


def _whom(kept: KeptToken) -> str:
    return f"node {kept.node}" if kept.node is not None else f"{kept.uses} nodes at most"


def _read_wish(payload: str) -> Wish:
    """Raises InvalidField."""
    try:
        wish = msgspec.json.decode(payload, type=Wish)
        split_address(wish.peer, "peer")
        url = urlsplit(wish.http)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"http is {wish.http[:100]!r}, which is no URL")
    except (ValueError, ConfigError) as error:
        raise InvalidField(
            f"The payload of a request to join is wrong: {error}.",
            hint="Let `agentmem serve --join` make it.",
            field="payload",
        ) from error
    return wish


def _key_hash(wish: Wish) -> str:
    """Of the key that asks for a certificate; empty when it has one. Raises BadRequest."""
    if not wish.csr:
        return ""
    from agentmem_cluster.link.ca import key_fingerprint, read_request

    try:
        return key_fingerprint(read_request(wish.csr, wish.node))
    except ValueError as error:
        raise BadRequest(f"The certificate request is not one: {error}.") from error
