"""A backup holds every tenant's memories: who may order one, and where it may go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.realtime import RealClock
from agentmem_node.api.backup_routes import BACKUP_ROUTES
from agentmem_node.backup.errors import BackupDestination
from agentmem_node.config import load
from agentmem_node.model.backups import CreateBackup, RestoreBackup
from agentmem_node.service.backup_work import Backups
from agentmem_node.service.contract import Caller


class NoMaker:
    def new_id(self) -> str:
        return "20260101T000000Z-000000"

    async def make(self, url: str, **_: Any) -> Any:
        raise AssertionError(f"{url} is not to be written to")


def ask(settings: dict[str, Any], key_id: str, request: CreateBackup | RestoreBackup) -> None:
    async def main() -> None:
        config = load(environment={}, overrides=settings).config
        anything: Any = NoMaker()
        backups = Backups(config, anything, anything, None, clock=RealClock())
        caller = Caller("acme", key_id, 0.0)
        if isinstance(request, CreateBackup):
            await backups.create(caller, request)
        else:
            await backups.restore(caller, request)
        await backups.stop()

    asyncio.run(main())


KEYS = {"security.api_keys": [{"tenant": "acme", "admin": True, "key_hash": "ab" * 32}]}


def test_where_there_are_keys_only_configured_places_are_taken(tmp_path: Path) -> None:
    for request in (CreateBackup(url="/tmp/elsewhere"), RestoreBackup(url="/tmp/elsewhere")):
        for settings in (KEYS, KEYS | {"backup.url": str(tmp_path)}):
            with pytest.raises(BackupDestination, match="may not be kept"):
                ask(settings, "boss", request)
    ask(KEYS | {"backup.url": str(tmp_path)}, "boss", CreateBackup(url=str(tmp_path)))
    ask(KEYS | {"backup.url": str(tmp_path)}, "boss", CreateBackup())
    ask(KEYS | {"backup.allow": [str(tmp_path)]}, "boss", CreateBackup(url=f"{tmp_path}/daily"))


def test_a_node_without_keys_takes_any_place(tmp_path: Path) -> None:
    ask({}, "", CreateBackup(url=str(tmp_path)))


def test_every_route_of_backups_needs_an_admins_key() -> None:
    assert len(BACKUP_ROUTES) == 4
    assert all(route.needs_admin and not route.is_open for route in BACKUP_ROUTES)


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("/var/backups/agents", True),
        ("/var/backups/agents/daily", True),
        ("file:///var/backups/agents/daily", True),
        ("/var/backups/agents2", False),
        ("/var/backups/agents/../../../etc", False),
        ("/etc", False),
        ("s3://bucket/daily?region=eu-north-1", True),
        ("s3://bucket/daily?region=eu-north-1&endpoint=http://169.254.169.254", False),
        ("s3://bucket2/daily?region=eu-north-1", False),
    ],
)
def test_a_request_names_only_places_that_are_allowed(url: str, is_allowed: bool) -> None:
    settings = {"backup.allow": ["/var/backups/agents", "s3://bucket?region=eu-north-1"]}
    try:
        ask(settings, "", CreateBackup(url=url))
    except AgentMemError as error:
        assert not is_allowed
        assert isinstance(error, BackupDestination) and "backup.allow" in error.hint
    else:
        assert is_allowed


def test_a_way_up_is_never_a_place_below(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/a/../b", f"file://{tmp_path}/a/%2e%2e/b"):
        with pytest.raises(BackupDestination):
            ask({"backup.allow": [f"{tmp_path}/a"]}, "", CreateBackup(url=url))
