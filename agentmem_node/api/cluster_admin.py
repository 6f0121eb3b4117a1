"""Handlers for operators who change a cluster. Who may, the server has checked before."""

from __future__ import annotations

from agentmem_node.api.context import Api
from agentmem_node.api.exchange import Exchange
from agentmem_node.api.reply import Reply, json_reply
from agentmem_node.api.shapes import CheckResult, OperationList
from agentmem_node.model import operations as ops


async def plan_operation(api: Api, exchange: Exchange, wish: ops.OperationWish) -> Reply:
    wish.check()
    return json_reply(await api.service.plan(exchange.caller, wish))


async def begin_operation(api: Api, exchange: Exchange, wish: ops.OperationWish) -> Reply:
    wish.check()
    return json_reply(await api.service.begin_operation(exchange.caller, wish), 202)


async def list_operations(api: Api, exchange: Exchange, query: object) -> Reply:
    found = await api.service.operations(exchange.caller)
    return json_reply(OperationList(operations=list(found)))


async def get_operation(api: Api, exchange: Exchange, query: object) -> Reply:
    return json_reply(await api.service.operation(exchange.caller, exchange.memory_id))


async def stop_operation(api: Api, exchange: Exchange, query: object) -> Reply:
    return await _control(api, exchange, "stop")


async def resume_operation(api: Api, exchange: Exchange, query: object) -> Reply:
    return await _control(api, exchange, "resume")


async def _control(api: Api, exchange: Exchange, action: ops.Action) -> Reply:
    return json_reply(
        await api.service.control_operation(exchange.caller, exchange.memory_id, action)
    )


async def check_cluster(api: Api, exchange: Exchange, query: object) -> Reply:
    findings = list(await api.service.check_cluster(exchange.caller))
    return json_reply(CheckResult(ok=all(finding.ok for finding in findings), findings=findings))
