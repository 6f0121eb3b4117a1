"""Every setting of a node: its meaning, type, bounds and default, and nothing else.

`agentmem_node.config` reads them from files, variables and flags; `docs/configuration.md` is
made from them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from agentmem_node.model.limits import Limits
from agentmem_node.model.search import LegName

MIB = 1024 * 1024
GIB = 1024 * MIB
NodeId = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]


class ConfigError(Exception):
    """A setting is wrong; the message names it, where it came from and what is allowed."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class NodeSection(_Section, frozen=True):
    """This process."""

    id: Annotated[
        NodeId,
        Meta(
            description="This node's name: a key of `cluster.nodes`, and the name in its "
            "certificate. It is written into the data directory, which then belongs to it for ever."
        ),
    ] = "n1"
    data_dir: Annotated[
        str, Meta(min_length=1, description="Where everything is kept: journal, shards, indexes.")
    ] = "agentmem-data"
    listen: Annotated[
        str,
        Meta(
            description="HOST:PORT of the HTTP API. Beyond loopback, a node refuses to start "
            "without an API key: an open memory store is found by strangers within hours."
        ),
    ] = "127.0.0.1:7700"
    peer_listen: Annotated[
        str | None,
        Meta(
            description="HOST:PORT of the link between nodes. Default: this node's `peer` "
            "address in `cluster.nodes`. A single node has none."
        ),
    ] = None
    zone: Annotated[
        str,
        Meta(
            max_length=64,
            description="Where this node stands: a rack, a machine, an availability zone. The "
            "replicas of a shard are spread over as many zones as there are.",
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="The least severe event that is logged to stderr."),
    ] = "info"
    log_format: Annotated[
        Literal["auto", "text", "json"],
        Meta(description="`auto`: text on a terminal, one JSON object a line otherwise."),
    ] = "auto"
    access_log: Annotated[
        bool, Meta(description="Log every HTTP request. It costs about a tenth of the throughput.")
    ] = False


class Peer(_Section, frozen=True):
    """Where one node of the cluster is reached."""

    peer: str
    http: str = ""


class ClusterSection(_Section, frozen=True):
    """The cluster that this node belongs to. Without `nodes` it is a single node of its own."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9._-]{1,64}$",
            description="Nodes of another cluster are refused: two clusters never mix.",
        ),
    ] = "agentmem"
    nodes: Annotated[
        dict[NodeId, Peer],
        Meta(
            description="Every node: its link address (`peer`, HOST:PORT) and the URL that "
            "clients use (`http`). The same on all nodes."
        ),
    ] = {}
    join: Annotated[
        bool,
        Meta(
            description="This node joins a cluster that exists, and never founds one. "
            "`agentmem serve --join` sets it."
        ),
    ] = False
    lost_after_ms: Annotated[
        int,
        Meta(
            ge=1_000,
            description="A node that cannot be reached for this long is taken as lost: its "
            "replicas are founded anew on other nodes, one shard at a time. Longer than a restart "
            "or an upgrade takes; when the node comes back it is given replicas by a rebalance.",
        ),
    ] = 300_000
    ca_cert: Annotated[
        str | None,
        Meta(description="PEM file of the authority that signs the certificates of nodes."),
    ] = None
    cert: Annotated[
        str | None,
        Meta(description="PEM file of this node's certificate; its name must be `node.id`."),
    ] = None
    key: Annotated[str | None, Meta(description="PEM file of the certificate's private key.")] = (
        None
    )
    ca_key: Annotated[
        str | None,
        Meta(
            description="PEM file of the authority's private key. A node that has it signs the "
            "certificates of nodes that join with a token; one such node is enough. Whoever reads "
            "the file can make nodes."
        ),
    ] = None
    shards: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="Shards of a new cluster. More shards spread load more evenly; each "
            "costs a Raft group. Fixed once the cluster exists.",
        ),
    ] = 16
    replication_factor: Annotated[
        int,
        Meta(
            ge=1,
            le=7,
            description="Copies of each shard, at most one a node. 3 survive the loss of one "
            "node, 5 of two. With fewer nodes: as many copies as nodes.",
        ),
    ] = 3


class RaftSection(_Section, frozen=True):
    """Timings of consensus. Shorter: faster fail-over, more false alarms on a slow network."""

    heartbeat_ms: Annotated[
        int, Meta(ge=5, le=10_000, description="How often a leader shows that it lives.")
    ] = 100
    election_ms_min: Annotated[
        int,
        Meta(
            ge=20,
            le=60_000,
            description="Shortest silence after which a follower stands for election: several "
            "heartbeats, so that one lost packet topples nobody.",
        ),
    ] = 500
    election_ms_max: Annotated[
        int,
        Meta(
            ge=20,
            le=120_000,
            description="Longest such silence. The spread keeps two from standing at once.",
        ),
    ] = 1_000


class StorageSection(_Section, frozen=True):
    """The disk."""

    map_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=16 * 1024 * GIB,
            description="Address space reserved for each shard's database: its largest size. "
            "Address space, not memory or disk.",
        ),
    ] = 64 * GIB
    checkpoint_ms: Annotated[
        int,
        Meta(
            ge=10,
            le=600_000,
            description="How often a shard's database is synced. In between the journal alone "
            "makes writes durable; longer means more to replay after a crash.",
        ),
    ] = 10_000
    copy_bytes_per_s: Annotated[
        int,
        Meta(
            ge=MIB,
            description="How fast a replica is copied from another node, at most: a copy must "
            "leave the disks and the network to those who read and write.",
        ),
    ] = 256 * MIB
    scrub_s: Annotated[
        float,
        Meta(
            ge=0,
            le=366 * 86_400,
            description="How often every row of a replica is compared with its checksum, beside "
            "soon after it is served; 0: never. What has rotted is made anew from the others.",
        ),
    ] = 86_400.0
    journal_segment_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=4 * GIB,
            description="Size of one preallocated journal file. A file is removed when every "
            "entry in it is in a checkpoint.",
        ),
    ] = 64 * MIB


class EmbeddingSection(_Section, frozen=True):
    """How text becomes vectors. All nodes of a cluster must agree; the first one decides."""

    provider: Annotated[
        Literal["minilm", "none"],
        Meta(
            description="`minilm`: all-MiniLM-L6-v2 on this machine, no network. `none`: no "
            "vectors, searches by words only."
        ),
    ] = "minilm"
    dim: Annotated[
        int,
        Meta(
            ge=0,
            le=8192,
            description="Dimension of vectors. 384 for `minilm`; with `none` the dimension of the "
            "vectors that clients send, or 0 for none.",
        ),
    ] = 384
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="Threads of the model. 0: one for each core but the first.",
        ),
    ] = 0
    cache_bytes: Annotated[
        int,
        Meta(ge=0, description="Memory for vectors of texts that were embedded lately. 0: none."),
    ] = 64 * MIB
    model_dir: Annotated[
        str | None,
        Meta(
            description="Where the model's files are kept. Default: the user's cache directory, "
            "shared by all nodes of the machine."
        ),
    ] = None


class SearchSection(_Section, frozen=True):
    """What a search means when the request does not say."""

    language: Annotated[
        str,
        Meta(
            pattern="^[a-z]{2}$",
            description="Language of stemming and stop words, as ISO 639-1.",
        ),
    ] = "en"
    legs: Annotated[
        dict[LegName, Annotated[float, Meta(ge=0, le=100)]],
        Meta(description="Weights of the engines. Empty: the measured defaults."),
    ] = {}
    index_bytes_max: Annotated[
        int,
        Meta(
            ge=16 * MIB,
            description="Memory that indexes of owners may take, all shards of the node together. "
            "The owner not searched for longest goes first, and is built again when searched.",
        ),
    ] = 2 * GIB
    hedge_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="A search over several shards asks a second replica when the first has "
            "not answered after this long.",
        ),
    ] = 50


class ApiKey(_Section, frozen=True):
    """One API key: `key_hash` (SHA-256, hex) or `key_env` (the variable that holds the key).

    `admin`: it may also move shards, drain and remove nodes, and check the cluster.
    """

    tenant: str = "default"
    id: str = ""
    admin: bool = False
    key_hash: str | None = None
    key_env: str | None = None


class SecuritySection(_Section, frozen=True):
    """Who may ask."""

    api_keys: Annotated[
        list[ApiKey],
        Meta(
            max_length=10_000,
            description="API keys and their tenants. Only hashes stand in a file: "
            "`agentmem key new` prints a key once, with the line for this list. Only keys with "
            "`admin = true` may change the cluster.",
        ),
    ] = []
    require: Annotated[
        bool | None,
        Meta(
            description="Refuse requests without an API key. Default: as soon as there is a key, "
            "or the node listens beyond loopback."
        ),
    ] = None


class BackupSection(_Section, frozen=True):
    """Backups, and the archived log that lets one go back to any moment. See docs/backups.md."""

    url: Annotated[
        str | None,
        Meta(
            description="Where backups are kept when a request does not say: `/path` or "
            "`s3://bucket/prefix?endpoint=URL&region=NAME`. Every node must reach it."
        ),
    ] = None
    allow: Annotated[
        list[str],
        Meta(
            max_length=100,
            description="Places that a request may name besides `url`, with what is below them: a "
            "backup holds the memories of all tenants, and a node writes with its own rights. "
            "Empty: none where there are API keys, any on a node that needs none.",
        ),
    ] = []
    archive: Annotated[
        str | None,
        Meta(
            description="Where the log is archived: the same kind of place, usually the same as "
            "`url`. Unset: only the moments of backups can be restored."
        ),
    ] = None
    archive_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=3_600_000,
            description="How often the log is archived: what a loss of the whole cluster costs.",
        ),
    ] = 5_000
    rate_bytes_per_s: Annotated[
        int,
        Meta(ge=0, description="How fast a node uploads a backup at most. 0: as fast as it can."),
    ] = 0
    hold_ms_max: Annotated[
        int,
        Meta(
            ge=50,
            le=10_000,
            description="How long writes may wait at most, in all shards at once, for the moment "
            "of a backup. They wait a few milliseconds when all nodes answer.",
        ),
    ] = 1_000


class Config(_Section, frozen=True):
    """All settings of a node."""

    node: NodeSection = NodeSection()
    cluster: ClusterSection = ClusterSection()
    raft: RaftSection = RaftSection()
    storage: StorageSection = StorageSection()
    embedding: EmbeddingSection = EmbeddingSection()
    search: SearchSection = SearchSection()
    security: SecuritySection = SecuritySection()
    backup: BackupSection = BackupSection()
    limits: Limits = Limits()

    @property
    def keys_required(self) -> bool:
        if self.security.require is not None:
            return self.security.require
        return bool(self.security.api_keys) or not is_loopback(self.node.listen)

    @property
    def replicas(self) -> int:
        """Copies of each shard: the replication factor, or as many as there are nodes."""
        return min(self.cluster.replication_factor, max(1, len(self.cluster.nodes)))

    @property
    def peer_listen(self) -> str | None:
        """HOST:PORT to bind the link to; None for a single node."""
        if self.node.peer_listen is not None:
            return self.node.peer_listen
        own = self.cluster.nodes.get(self.node.id)
        return own.peer if own is not None and self.has_link else None

    @property
    def has_link(self) -> bool:
        """Whether there are other nodes, or may be: one node with certificates can be joined."""
        nodes = self.cluster.nodes
        return len(nodes) > 1 or (len(nodes) == 1 and self.cluster.cert is not None)


@dataclass(frozen=True, slots=True)
class Key:
    """One setting, as documented."""

    name: str  # "limits.body_bytes_max"
    type: Any
    meaning: str
    allowed: str
    default: Any

    @property
    def variable(self) -> str:
        return "AGENTMEM_" + self.name.replace(".", "_").upper()


def _keys() -> Iterator[Key]:
    for section, section_type in get_type_hints(Config).items():
        hints = get_type_hints(section_type, include_extras=True)
        defaults = section_type()
        for field in section_type.__struct_fields__:
            annotated = hints[field]
            metas = [m for m in get_args(annotated)[1:] if isinstance(m, Meta)]
            yield Key(
                name=f"{section}.{field}",
                type=annotated,
                meaning=next(m.description for m in metas if m.description),
                allowed=_allowed(annotated),
                default=getattr(defaults, field),
            )


def _allowed(annotated: Any) -> str:
    schema = msgspec.json.schema(annotated)
    return _schema_text(schema, schema.get("$defs", {}))


def _schema_text(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        target = defs[schema["$ref"].rpartition("/")[2]]
        return "{" + ", ".join(target["properties"]) + "}"
    if "anyOf" in schema:
        return " or ".join(_schema_text(part, defs) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    kind = schema.get("type")
    names = {"integer": "whole number", "boolean": "true or false", "null": "unset"}
    text = names.get(str(kind), str(kind))
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"table of {_schema_text(schema['additionalProperties'], defs)}"
    if kind == "array":
        return f"list of {_schema_text(schema['items'], defs)}"
    bounds = [
        f"{word} {schema[name]:,}"
        for name, word in (("minimum", "at least"), ("maximum", "at most"))
        if name in schema
    ]
    if "pattern" in schema:
        bounds.append(f"matching `{schema['pattern']}`")
    return " ".join([text, *bounds[:1], *(f"and {b}" for b in bounds[1:])])


KEYS: dict[str, Key] = {key.name: key for key in _keys()}
SECTIONS: dict[str, type[msgspec.Struct]] = get_type_hints(Config)
BY_VARIABLE = {key.variable: key for key in KEYS.values()}


def split_address(address: str, name: str = "address") -> tuple[str, int]:
    """(host, port) of `HOST:PORT`; an IPv6 host stands in brackets. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    bad_host = not host or (":" in host) != bracketed or any(c.isspace() for c in host)
    if not colon or bad_host or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65_535:
        raise ConfigError(f"{name} = {address!r} is not HOST:PORT, like 127.0.0.1:7700.")
    return host, int(port)


@lru_cache(maxsize=64)  # asked for each request, always of the same address
def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `HOST:PORT`. Names but `localhost` count as reachable."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def show(value: Any) -> str:
    """A value as TOML-like text."""
    if value is None:
        return "unset"
    return msgspec.json.encode(value).decode()
