"""The backups of one store: listing them, choosing one, and who may change the store meanwhile.

A backup in progress leans on chunks that no manifest may name yet, and removing old backups
removes chunks that no manifest names. Each of the two says first what it is about to do
(`running/...`) and then looks whether the other has: whichever order they come in, at least one
of them sees the other. A notice that was not renewed for ten minutes belonged to a process that
was killed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import msgspec

from agentmem_node.backup import manifest as mf
from agentmem_node.backup.errors import BackupBusy, BackupDamaged, BackupMissing
from agentmem_node.backup.objects import ObjectStore

Kind = Literal["create", "prune"]

RUNNING_PREFIX: Final = "running/"
NOTICE_S: Final = 60.0  # how often a notice is renewed
STALE_MS: Final = 600_000


class Listed(NamedTuple):
    """A manifest in the store; `manifest` is None when it is damaged, and `fault` says how."""

    id: str
    manifest: mf.Manifest | None
    fault: str = ""


class _Notice(msgspec.Struct, frozen=True):
    kind: Kind
    at_ms: int


def new_id(at_ms: int, token: bytes) -> str:
    """`20260131T093000Z-1f2e3d`: ids sort by time."""
    when = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{when:%Y%m%dT%H%M%SZ}-{token.hex()}"


def listed(store: ObjectStore) -> list[Listed]:
    """All backups, oldest first, damaged ones too."""
    found = []
    for item in store.list(mf.PREFIX):
        backup_id = mf.id_of(item.name)
        if backup_id is None:
            continue
        try:
            found.append(Listed(backup_id, mf.decode(item.name, store.get(item.name))))
        except BackupMissing:
            continue  # removed meanwhile
        except BackupDamaged as error:
            found.append(Listed(backup_id, None, error.message))
    found.sort(key=_moment)
    return found


def _moment(item: Listed) -> tuple[str, int, str]:
    """Two backups of one second are told apart by what they say of themselves."""
    at_ms = 0 if item.manifest is None else item.manifest.at_ms
    return item.id.partition("-")[0], at_ms, item.id


def load(store: ObjectStore, backup_id: str) -> mf.Manifest:
    """Raises BackupMissing, BackupDamaged."""
    name = mf.manifest_name(backup_id)
    try:
        return mf.decode(name, store.get(name))
    except (BackupMissing, ValueError):
        raise no_backup(store, backup_id) from None


def choose(
    store: ObjectStore,
    *,
    backup_id: str | None = None,
    until_ms: int | None = None,
    cluster_id: str | None = None,
) -> mf.Manifest:
    """The backup to restore from: the named one, or the newest that holds nothing later than
    `until_ms`, of `cluster_id` if that is given.

    Raises BackupMissing, BackupDamaged: a damaged backup is never passed over in silence.
    """
    if backup_id is not None:
        return load(store, backup_id)
    for item in reversed(listed(store)):
        if item.manifest is None:
            raise BackupDamaged(
                f"The newest backup that may fit, {item.id}, is damaged: {item.fault}",
                hint="Name an older one with --backup, or remove the damaged manifest.",
                backup=item.id,
            )
        if cluster_id is not None and item.manifest.cluster_id != cluster_id:
            continue
        if until_ms is None or holds_nothing_after(item.manifest, until_ms):
            return item.manifest
    raise BackupMissing(
        f"There is no backup {'' if cluster_id is None else 'of this cluster '}in {store.url}"
        + (" from before that moment." if until_ms is not None else "."),
        hint="`agentmem backup list` shows what is there.",
    )


def holds_nothing_after(manifest: mf.Manifest, until_ms: int) -> bool:
    return manifest.at_ms <= until_ms and all(s.newest_ms <= until_ms for s in manifest.shards)


def no_backup(store: ObjectStore, backup_id: str) -> BackupMissing:
    return BackupMissing(
        f"There is no backup {backup_id[:80]!r} in {store.url}.",
        hint="`agentmem backup list` shows what backups are there.",
    )


class Notice:
    """Says that work is going on. Made by `begin`; `renew` and `end` it."""

    def __init__(self, store: ObjectStore, name: str, kind: Kind) -> None:
        self._store = store
        self._name = name
        self._kind: Kind = kind

    @classmethod
    def begin(
        cls, store: ObjectStore, kind: Kind, work_id: str, now_ms: Callable[[], int]
    ) -> Notice:
        """Raises BackupBusy when the other kind of work is going on."""
        notice = cls(store, f"{RUNNING_PREFIX}{kind}-{work_id}.json", kind)
        notice.renew(now_ms())
        other: Kind = "prune" if kind == "create" else "create"
        try:
            for item in store.list(f"{RUNNING_PREFIX}{other}-"):
                at_ms = _at_ms(store, item.name)
                if at_ms is not None and now_ms() - at_ms < STALE_MS:
                    raise BackupBusy(
                        f"{_DOING[other]} in {store.url} ({item.name}).",
                        hint="Wait until it has ended. If it was killed, its notice counts no "
                        f"more {STALE_MS // 60_000} minutes after its last sign of life.",
                    )
        except BaseException:
            notice.end()
            raise
        return notice

    def renew(self, now_ms: int) -> None:
        self._store.put(self._name, msgspec.json.encode(_Notice(self._kind, now_ms)))

    def end(self) -> None:
        self._store.delete(self._name)


_DOING: Final[dict[Kind, str]] = {
    "create": "A backup is being made",
    "prune": "Old backups are being removed",
}


def _at_ms(store: ObjectStore, name: str) -> int | None:
    try:
        return msgspec.json.decode(store.get(name), type=_Notice).at_ms
    except (BackupMissing, msgspec.MsgspecError, UnicodeDecodeError):
        return None
