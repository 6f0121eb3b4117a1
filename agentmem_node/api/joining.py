"""Handlers for nodes that join, and for those who let them."""

from __future__ import annotations

from agentmem_node.api.context import Api
from agentmem_node.api.exchange import Exchange
from agentmem_node.api.reply import Reply, json_reply
from agentmem_node.api.shapes import JoinTokenList
from agentmem_node.service.join_messages import JoinRequest, JoinTokenRequest


async def make_join_token(api: Api, exchange: Exchange, wish: JoinTokenRequest) -> Reply:
    made = await api.service.make_join_token(exchange.caller, wish)
    return json_reply(made, 201, b"Cache-Control: no-store\r\n")


async def list_join_tokens(api: Api, exchange: Exchange, query: object) -> Reply:
    found = await api.service.join_tokens(exchange.caller)
    return json_reply(JoinTokenList(tokens=list(found)))


async def revoke_join_token(api: Api, exchange: Exchange, query: object) -> Reply:
    return json_reply(await api.service.revoke_join_token(exchange.caller, exchange.memory_id))


async def join(api: Api, exchange: Exchange, request: JoinRequest) -> Reply:
    return json_reply(await api.service.join(request))
