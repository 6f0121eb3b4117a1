"""Handlers of /backups: begin work and tell how it goes."""

from __future__ import annotations

from agentmem_node.api.context import Api
from agentmem_node.api.exchange import Exchange
from agentmem_node.api.reply import Reply, json_reply
from agentmem_node.model import backups as bk


async def create_backup(api: Api, exchange: Exchange, body: bk.CreateBackup) -> Reply:
    return json_reply(await api.service.backups.create(exchange.caller, body), 202)


async def restore_backup(api: Api, exchange: Exchange, body: bk.RestoreBackup) -> Reply:
    return json_reply(await api.service.backups.restore(exchange.caller, body), 202)


async def list_backups(api: Api, exchange: Exchange, query: bk.BackupQuery) -> Reply:
    return json_reply(await api.service.backups.list(exchange.caller, query.url))


async def backup_work(api: Api, exchange: Exchange, query: object) -> Reply:
    return json_reply(await api.service.backups.get(exchange.caller, exchange.memory_id))
