"""The one place that reads configuration: defaults, a TOML file, AGENTMEM_* variables, flags.

Later sources win, key by key. Every key has a meaning, a type, bounds and a default that stand
here and nowhere else: `docs/configuration.md` and `agentmem config explain KEY` are made from
them (`python -m agentmem_node.config --markdown`). A key that is unknown or out of bounds stops
the start, because a setting that is silently ignored is found out on the worst day.

    [limits]                                    # node.toml
    body_bytes_max = "16MiB"

    AGENTMEM_LIMITS_BODY_BYTES_MAX=16MiB        # the environment: AGENTMEM_<SECTION>_<KEY>
    --set limits.body_bytes_max=16MiB           # the command line
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from agentmem_node.config_keys import (
    BY_VARIABLE,
    KEYS,
    SECTIONS,
    ApiKey,
    Config,
    ConfigError,
    Key,
    Peer,
    is_loopback,
    show,
    split_address,
)

__all__ = [
    "KEYS",
    "ApiKey",
    "Config",
    "ConfigError",
    "Explanation",
    "Key",
    "Peer",
    "Settings",
    "check_startup",
    "is_loopback",
    "load",
    "markdown",
    "split_address",
]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `agentmem config explain KEY` shows."""

    key: Key
    value: Any
    source: str  # "default", "node.toml", "environment AGENTMEM_...", "command line"

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.key.name} = {show(self.value)}",
                f"  {self.key.meaning}",
                f"  allowed: {self.key.allowed}",
                f"  default: {show(self.key.default)}",
                f"  set by:  {self.source}",
                f"  change:  [{self.key.name.split('.')[0]}] in the file, or {self.key.variable}",
            )
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration with the origin of each value."""

    config: Config
    sources: Mapping[str, str]

    def explain(self, name: str) -> Explanation:
        """Meaning, default, value and origin of one key. Raises ConfigError when it is unknown."""
        key = KEYS.get(name)
        if key is None:
            raise ConfigError(f"There is no setting {name!r}.{_nearest(name)}")
        section, field = name.split(".")
        return Explanation(
            key,
            getattr(getattr(self.config, section), field),
            self.sources.get(name, "default"),
        )


# Variables of other parts (the client's URL and key, the file's path, keys named by key_env).
_FOREIGN = re.compile(
    r"^AGENTMEM_(CONFIG|URL|API_KEY|JOIN_TOKEN|KEY_\w+|TEST_\w+|BENCH_\w+|CHAOS_\w+"
    # Kubernetes sets these in every pod beside a service called agentmem or agentmem-*.
    r"|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|(\w+_)?PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)


def load(
    path: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Read defaults, the TOML file, AGENTMEM_* and then `overrides` (`{"node.listen": "..."}`).

    `path` None: the file that AGENTMEM_CONFIG names, or none. Raises ConfigError.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is None:
        path = environment.get("AGENTMEM_CONFIG") or None
    if path is not None:
        for name, value in _read_file(Path(path)):
            values[name], sources[name] = _convert(name, value, str(path)), str(path)
    for name, text, variable in _read_environment(environment):
        source = f"environment {variable}"
        values[name], sources[name] = _convert(name, text, source, text=True), source
    for name, value in (overrides or {}).items():
        if name not in KEYS:
            raise ConfigError(f"There is no setting {name!r}.{_nearest(name)}")
        text_given = isinstance(value, str)
        values[name] = _convert(name, value, "command line", text=text_given)
        sources[name] = "command line"
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    built: dict[str, Any] = {name: SECTIONS[name](**given) for name, given in sections.items()}
    config = Config(**built)
    _check_together(config)
    return Settings(config, sources)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    for section, fields in document.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: there is no section [{section}].{_nearest(section)}")
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: [{section}] must be a table of settings.")
        for field, value in fields.items():
            name = f"{section}.{field}"
            if name not in KEYS:
                raise ConfigError(f"{path}: there is no setting {name!r}.{_nearest(name)}")
            yield name, value


def _read_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for variable, text in sorted(environment.items()):
        if not variable.startswith("AGENTMEM_"):
            continue
        key = BY_VARIABLE.get(variable)
        if key is not None:
            yield key.name, text, variable
        elif not _FOREIGN.match(variable):
            near = difflib.get_close_matches(variable, BY_VARIABLE, 1, 0.6)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"The environment sets {variable}, which is no setting.{hint}")


def _nearest(name: str) -> str:
    """` Did you mean X?`, or the list of sections."""
    candidates = [*KEYS, *SECTIONS]
    near = difflib.get_close_matches(name, candidates, 1, 0.6)
    if not near:  # the right key in a wrong section
        field = name.rpartition(".")[2]
        near = [key for key in KEYS if key.endswith(f".{field}")][:1]
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Sections: {', '.join(SECTIONS)}; docs/configuration.md lists every key."


_SIZE = re.compile(r"^\s*(\d+)\s*([KMGT]i?B?|B)\s*$", re.IGNORECASE)
_POWERS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _convert(name: str, value: Any, source: str, *, text: bool = False) -> Any:
    """`value` as the key's type. `text`: it came as a string, whatever the type."""
    key = KEYS[name]
    is_size = "bytes" in name
    if is_size and isinstance(value, str) and (match := _SIZE.match(value)):
        value = int(match[1]) * 1024 ** _POWERS[match[2][0].upper()]
    elif text and isinstance(value, str):
        value = _parse_text(key, value, source)
    try:
        return msgspec.convert(value, key.type, strict=not text)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{name} = {show(value)} ({source}) is not allowed: {error}. "
            f"Allowed: {key.allowed}. {key.meaning}"
        ) from error


def _parse_text(key: Key, text: str, source: str) -> Any:
    if isinstance(key.default, dict | list):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{key.name} ({source}) must be JSON: {error}.") from error
    if text == "" and (key.default is None):
        return None
    return text


def _check_together(config: Config) -> None:
    """What no single key can tell."""
    node, cluster, raft = config.node, config.cluster, config.raft
    for name, address in (("node.listen", node.listen), ("node.peer_listen", node.peer_listen)):
        if address is not None:
            split_address(address, name)
    if cluster.nodes and node.id not in cluster.nodes:
        raise ConfigError(
            f"node.id is {node.id!r}, which cluster.nodes does not list "
            f"({', '.join(cluster.nodes)}). Every node must know itself."
        )
    for peer_id, peer in cluster.nodes.items():
        split_address(peer.peer, f"cluster.nodes.{peer_id}.peer")
    if raft.election_ms_min < 2 * raft.heartbeat_ms:
        raise ConfigError(
            f"raft.election_ms_min ({raft.election_ms_min}) must be at least twice "
            f"raft.heartbeat_ms ({raft.heartbeat_ms}), or one late packet starts an election."
        )
    if raft.election_ms_max <= raft.election_ms_min:
        raise ConfigError(
            f"raft.election_ms_max ({raft.election_ms_max}) must be above raft.election_ms_min "
            f"({raft.election_ms_min}): the spread decides elections."
        )
    limits = config.limits
    if limits.deadline_ms_default > limits.deadline_ms_max:
        raise ConfigError("limits.deadline_ms_default is above limits.deadline_ms_max.")
    if limits.bodies_bytes_max < limits.body_bytes_max:
        raise ConfigError(
            "limits.bodies_bytes_max is below limits.body_bytes_max: the largest body would "
            "never be taken."
        )
    if config.embedding.provider == "minilm" and config.embedding.dim != 384:
        raise ConfigError("embedding.dim must be 384 with embedding.provider = 'minilm'.")
    given = {name: getattr(cluster, name) for name in ("ca_cert", "cert", "key")}
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(f"cluster.{name}" for name, value in given.items() if not value)
        raise ConfigError(f"The link's TLS needs all of its files; missing: {missing}.")
    for number, entry in enumerate(config.security.api_keys):
        where = f"security.api_keys[{number}]"
        if (entry.key_hash is None) == (entry.key_env is None):
            raise ConfigError(f"{where} needs either key_hash or key_env.")
        if entry.key_hash is not None and not re.fullmatch("[0-9a-f]{64}", entry.key_hash):
            raise ConfigError(f"{where}.key_hash must be a SHA-256: 64 digits 0-9 a-f.")


def check_startup(config: Config, *, has_certificates: bool = False) -> None:
    """Refuse what would expose data. Raises ConfigError that says what to do.

    `has_certificates`: it is about to get some, by joining.
    """
    security = config.security
    if not is_loopback(config.node.listen):
        if not security.api_keys:
            raise ConfigError(
                f"node.listen is {config.node.listen}, which other machines can reach, and there "
                "is no API key: anybody could read and delete every memory. Make a key with "
                "`agentmem key new` and put the line it prints under [security], or listen on "
                "127.0.0.1."
            )
        if security.require is False:
            raise ConfigError(
                f"security.require is false but node.listen is {config.node.listen}, which other "
                "machines can reach. Remove security.require, or listen on 127.0.0.1."
            )
    peer_listen = config.peer_listen
    has_certificates = has_certificates or config.cluster.ca_cert is not None
    if peer_listen is not None and not is_loopback(peer_listen) and not has_certificates:
        raise ConfigError(
            f"The link between nodes listens on {peer_listen}, which other machines can reach, "
            "and has no certificates. Set cluster.ca_cert, cluster.cert and cluster.key."
        )


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Made by `python -m agentmem_node.config --markdown`; a test keeps it complete.",
        "",
        "A node reads, in this order, its defaults, a TOML file (`agentmem serve --config FILE`,",
        "or the file that `AGENTMEM_CONFIG` names), environment variables, and the command line;",
        "the last one wins. The variable of a key is `AGENTMEM_<SECTION>_<KEY>`; lists and tables",
        "are given to it as JSON. Keys in bytes take sizes such as `64MiB` too. An unknown key, a",
        "wrong type or a value out of bounds stops the start. `agentmem config explain KEY` shows",
        "what a key means, its value, and where that came from.",
    ]
    for section, section_type in SECTIONS.items():
        lines += ["", f"## [{section}]", "", (section_type.__doc__ or "").strip()]
        for key in KEYS.values():
            if key.name.startswith(f"{section}."):
                lines += [
                    "",
                    f"### {key.name}",
                    "",
                    key.meaning,
                    "",
                    f"- Allowed: {key.allowed}",
                    f"- Default: `{show(key.default)}`",
                    f"- Variable: `{key.variable}`",
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(markdown())
    else:
        sys.exit("usage: python -m agentmem_node.config --markdown")
