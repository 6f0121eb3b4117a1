"""A node's side of joining: ask with a token, check the answer, write what the node needs.

DIR/node.key            the node's own, made here; it never leaves this machine
DIR/node.crt, ca.crt    what the cluster answered (none of the three, when the node has its own)
DIR/node.toml           written last: a directory that has it has joined

Until then nothing stands in DIR that cannot be used again: a join that was interrupted is repeated
with the same token, the same key and the same disk, and the cluster answers the same.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import ssl
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.link.ca import check_certificate, request_certificate, write_private
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.meta import LEVEL
from agentmem_cluster.realtime import RealDisk, RealRng
from agentmem_node.config_file import to_toml
from agentmem_node.providers.registry import identity_of
from agentmem_node.service.admission import open_record
from agentmem_node.service.join_messages import (
    SHARED_SETTINGS,
    JoinAnswer,
    JoinRequest,
    Welcome,
    Wish,
)
from agentmem_node.service.join_tokens import (
    JoinToken,
    is_proof,
    proof_of_answer,
    proof_of_request,
)

CONFIG_NAME: Final = "node.toml"
_HEADING: Final = "Written by `agentmem serve --join`, once. Change what you like but the names."
_FILES: Final = {
    "cluster.ca_cert": "ca.crt",
    "cluster.cert": "node.crt",
    "cluster.key": "node.key",
}
_PATH: Final = "/api/v1/cluster/join"
_ATTEMPT_S: Final = 10.0
# Several elections.
_PATIENCE_S: Final = 15.0
_PAUSE_S: Final = 1.0
_ANSWER_BYTES_MAX: Final = 4 << 20
_NONCE_BYTES: Final = 16
# What another try, or another node, may answer differently.
_PASSING: Final = frozenset({429, 502, 503, 504})


class JoinFailed(Exception):
    """The node was not let in; the message says why and what to do. Nothing has joined."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Who joins. `peer`, `http`: where others reach it. `settings`: what the operator chose."""

    node_id: str
    data: Path
    peer: str
    http: str
    zone: str
    version: str
    settings: Mapping[str, Any]

    @property
    def has_certificate(self) -> bool:
        """Whether the operator gave it one, of the cluster's authority."""
        return "cluster.cert" in self.settings


def has_joined(data: Path) -> bool:
    """Whether joining left its node.toml there. Raises JoinFailed when it cannot be read."""
    path = data / CONFIG_NAME
    try:
        return tomllib.loads(path.read_text()).get("cluster", {}).get("join") is True
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise JoinFailed(f"{path} cannot be read: {error}.") from error


def join(
    newcomer: Newcomer, token: JoinToken, urls: Sequence[str], *, say: Callable[[str], None]
) -> Path:
    """Ask the nodes at `urls` until one lets this one in; returns its node.toml.

    Raises JoinFailed.
    """
    data = newcomer.data
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(data):
            return _join(newcomer, token, urls, say)
    except OSError as error:
        raise JoinFailed(f"Cannot write to {data}: {error.strerror or error}.") from error


def _join(
    newcomer: Newcomer, token: JoinToken, urls: Sequence[str], say: Callable[[str], None]
) -> Path:
    data = newcomer.data
    if has_joined(data):
        return data / CONFIG_NAME  # another process was quicker
    if (data / CONFIG_NAME).exists():
        raise JoinFailed(
            f"{data / CONFIG_NAME} is not of a node that joined, and would be overwritten. Keep it "
            "elsewhere and name it with --config."
        )
    rng = RealRng()
    record = _fresh_record(data, rng)
    try:
        own = newcomer.has_certificate
        csr = "" if own else request_certificate(data / "node.key", newcomer.node_id)
    except ValueError as error:
        raise JoinFailed(f"{error}. Remove the file, and join with a new token.") from error
    nonce = rng.token(_NONCE_BYTES).hex()
    wish = Wish(
        node=newcomer.node_id,
        csr=csr,
        peer=newcomer.peer,
        http=newcomer.http,
        zone=newcomer.zone,
        version=newcomer.version,
        level=LEVEL,
        incarnation=record.incarnation,
        nonce=nonce,
    )
    payload = msgspec.json.encode(wish).decode()
    request = JoinRequest(
        token_id=token.id, payload=payload, proof=proof_of_request(token.key, payload)
    )
    answer = asyncio.run(_ask(urls, msgspec.json.encode(request), say))
    if not is_proof(proof_of_answer(token.key, nonce, answer.payload), answer.proof):
        raise JoinFailed(
            "The answer does not come from the cluster that made this token, or was changed on "
            "the way: nothing was taken from it. Is --at the cluster's own address?"
        )
    try:
        welcome = msgspec.json.decode(answer.payload, type=Welcome)
    except ValueError as error:
        raise JoinFailed(
            f"The cluster's answer is of a version that this one cannot read: {error}."
        ) from error
    return _settle(newcomer, wish, welcome)


def _fresh_record(data: Path, rng: RealRng) -> LocalRecord:
    if (data / "journal").exists() or (data / "node.json").exists():
        raise JoinFailed(
            f"{data} holds the data of a node already. A node joins with an empty directory: "
            "choose another with --data."
        )
    record = open_record(RealDisk(data), (), rng)
    if record.is_admitted:
        raise JoinFailed(f"{data} was part of a cluster before: choose another with --data.")
    return record


def _settle(newcomer: Newcomer, wish: Wish, welcome: Welcome) -> Path:
    """Write what the cluster answered; node.toml last. Raises JoinFailed."""
    data = newcomer.data.absolute()
    shared = {name: welcome.settings[name] for name in SHARED_SETTINGS if name in welcome.settings}
    settings = shared | dict(newcomer.settings)
    _check_model(settings, welcome)
    files = {name: data / file for name, file in _FILES.items()}
    if newcomer.has_certificate:
        files = {name: Path(str(settings[name])).absolute() for name in _FILES}
    try:
        if not newcomer.has_certificate:
            check_certificate(welcome.ca_cert, welcome.certificate, wish.csr)
            write_private(files["cluster.ca_cert"], welcome.ca_cert.encode())
            write_private(files["cluster.cert"], welcome.certificate.encode())
        LinkTls.load(
            files["cluster.ca_cert"],
            files["cluster.cert"],
            files["cluster.key"],
            welcome.cluster,
            wish.node,
        )
    except (ssl.SSLError, ValueError) as error:
        whose = "This node has" if newcomer.has_certificate else "The cluster answered with"
        raise JoinFailed(f"{whose} a wrong certificate: {error}") from error
    values = settings | {
        "node.id": wish.node,
        "node.data_dir": str(data),
        "cluster.name": welcome.cluster,
        "cluster.join": True,
        **{name: str(file) for name, file in files.items()},
        "cluster.nodes": {
            name: {"peer": place.peer, "http": place.http}
            for name, place in sorted(welcome.peers.items())
        },
    }
    write_private(data / CONFIG_NAME, to_toml(_HEADING, values).encode())
    RealDisk(data).sync_dir("")
    return data / CONFIG_NAME


def _check_model(settings: Mapping[str, Any], welcome: Welcome) -> None:
    """Raises JoinFailed when this node was told to embed with another model."""
    name, dim, model_hash = welcome.model
    own = identity_of(
        settings.get("embedding.provider", "minilm"), settings.get("embedding.dim", dim)
    )
    if (own.name, own.dim, own.model_hash) != (name, dim, model_hash):
        raise JoinFailed(
            f"The cluster embeds with {name} ({dim} dimensions), and this node is set to {own}. "
            "Leave embedding.provider and embedding.dim out, to take the cluster's."
        )


async def _ask(urls: Sequence[str], body: bytes, say: Callable[[str], None]) -> JoinAnswer:
    """The first answer of any of the nodes. Raises JoinFailed when one refuses, or none answers."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _PATIENCE_S
    told = ""
    timeout = aiohttp.ClientTimeout(total=_ATTEMPT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            for url in urls:
                try:
                    return await _ask_one(session, url, body)
                except _Passing as error:
                    trouble = f"{url}: {error}"
                    if trouble != told:
                        say(f"joining: {trouble}")
                    told = trouble
            if loop.time() + _PAUSE_S > until:
                raise JoinFailed(f"No node let this one in within {_PATIENCE_S:.0f} s. {told}")
            await asyncio.sleep(_PAUSE_S)


class _Passing(Exception):
    """Worth another try."""


async def _ask_one(session: aiohttp.ClientSession, url: str, body: bytes) -> JoinAnswer:
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(
            url + _PATH, data=body, headers=headers, allow_redirects=False
        ) as answer:
            text = await answer.content.read(_ANSWER_BYTES_MAX)
            while not answer.content.at_eof() and len(text) < _ANSWER_BYTES_MAX:
                text += await answer.content.read(_ANSWER_BYTES_MAX)
            status = answer.status
    except aiohttp.InvalidURL as error:
        raise JoinFailed(f"--at: {url!r} is not the URL of a node.") from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _Passing(str(error) or type(error).__name__) from error
    if status == 200:
        try:
            return msgspec.json.decode(text, type=JoinAnswer)
        except ValueError as error:
            raise JoinFailed(f"{url} answers, but is no node of AgentMem: {error}.") from error
    why = _detail(text) or f"status {status}"
    if status in _PASSING:
        raise _Passing(why)
    raise JoinFailed(f"{url} refused: {why}")


def _detail(text: bytes) -> str:
    try:
        found = msgspec.json.decode(text)
        return str(found["detail"]) if isinstance(found, dict) else ""
    except (ValueError, KeyError):
        return ""


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Against a second process that joins, or runs, with the same directory. Raises JoinFailed."""
    lock = os.open(data / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JoinFailed(
                f"{data} is in use by another process. Stop it first, or choose another directory "
                "with --data."
            ) from error
        yield
    finally:
        os.close(lock)
