"""Configuration is read from one place, explained, and refused when it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.config import (
    KEYS,
    Config,
    ConfigError,
    check_startup,
    is_loopback,
    load,
    markdown,
    split_address,
)
from agentmem_node.config_keys import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
HASH = "ab" * 32


def read(
    tmp_path: Path | None = None,
    toml: str | None = None,
    environment: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Config:
    path = None
    if toml is not None:
        assert tmp_path is not None
        path = tmp_path / "node.toml"
        path.write_text(toml)
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load(path, environment or {}, named).config


def test_the_defaults_are_a_single_node_on_loopback() -> None:
    config = read()
    assert config.node.listen == "127.0.0.1:7700"
    assert (config.replicas, config.peer_listen, config.keys_required) == (1, None, False)
    check_startup(config)


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    toml = '[limits]\ntop_k_max = 10\nbatch_items_max = 20\n[node]\nid = "n7"\n'
    environment = {"AGENTMEM_LIMITS_TOP_K_MAX": "30", "AGENTMEM_LIMITS_CATEGORIES_MAX": "5"}
    (tmp_path / "node.toml").write_text(toml)
    settings = load(
        tmp_path / "node.toml", environment, {"limits.categories_max": 6, "raft.heartbeat_ms": "9"}
    )
    limits = settings.config.limits
    assert (limits.top_k_max, limits.batch_items_max, limits.categories_max) == (30, 20, 6)
    assert settings.config.node.id == "n7"
    assert settings.config.raft.heartbeat_ms == 9
    assert settings.explain("limits.top_k_max").source == "environment AGENTMEM_LIMITS_TOP_K_MAX"
    assert settings.explain("limits.batch_items_max").source.endswith("node.toml")
    assert settings.explain("limits.categories_max").source == "command line"
    assert settings.explain("limits.page_items_max").source == "default"


def test_agentmem_config_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "here.toml").write_text('[node]\nid = "n9"\n')
    config = load(None, {"AGENTMEM_CONFIG": str(tmp_path / "here.toml")}).config
    assert config.node.id == "n9"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16MiB", 1 << 24),
        ("16 mb", 1 << 24),
        ("2048K", 1 << 21),
        ("1gib", 1 << 30),
        ("4194304", 1 << 22),
    ],
)
def test_bytes_take_units(tmp_path: Path, text: str, size: int) -> None:
    assert read(environment={"AGENTMEM_STORAGE_MAP_BYTES": text}).storage.map_bytes == size
    written = f'"{text}"' if not text.isdigit() else text
    config = read(tmp_path, f"[storage]\nmap_bytes = {written}\n")
    assert config.storage.map_bytes == size


def test_lists_and_tables_come_as_json_in_variables() -> None:
    nodes = '{"n1": {"peer": "127.0.0.1:8701", "http": "http://127.0.0.1:7701"}}'
    keys = f'[{{"tenant": "acme/prod", "key_hash": "{HASH}"}}]'
    config = read(environment={"AGENTMEM_CLUSTER_NODES": nodes, "AGENTMEM_SECURITY_API_KEYS": keys})
    assert config.cluster.nodes["n1"].http == "http://127.0.0.1:7701"
    assert config.security.api_keys[0].tenant == "acme/prod"
    assert config.keys_required


WRONG: list[tuple[str, str]] = [
    ("[limit]\ntop_k_max = 1", "no section [limit]. Did you mean 'limits'?"),
    ("[limits]\ntop_k = 1", "no setting 'limits.top_k'. Did you mean 'limits.top_k_max'?"),
    ("[raft]\ntop_k_max = 1", "no setting 'raft.top_k_max'. Did you mean 'limits.top_k_max'?"),
    ("limits = 5", "[limits] must be a table"),
    ("[limits]\ntop_k_max = 0", "limits.top_k_max = 0"),
    ('[limits]\ntop_k_max = "many"', "limits.top_k_max"),
    ("[limits]\ntop_k_max = 1.5", "limits.top_k_max"),
    ("[limits]\ntop_k_max = true", "limits.top_k_max"),
    ('[limits]\nbody_bytes_max = "16 pounds"', "limits.body_bytes_max"),
    ("[limits\n", "is not valid TOML"),
    ('[node]\nid = "N 1"', "node.id"),
    ('[node]\nlisten = "7700"', "node.listen = '7700' is not HOST:PORT"),
    ('[node]\nlisten = "::1:7700"', "is not HOST:PORT"),
    ('[node]\nlisten = "127.0.0.1:99999"', "is not HOST:PORT"),
    ('[node]\nlog_level = "loud"', "node.log_level"),
    ('[cluster.nodes.n2]\npeer = "127.0.0.1:1"', "Every node must know itself"),
    ('[cluster.nodes.n1]\npeer = "nowhere"', "cluster.nodes.n1.peer"),
    ('[cluster.nodes.n1]\npeer = "a:1"\nport = 5', "port"),
    ("[raft]\nheartbeat_ms = 400", "at least twice"),
    ("[raft]\nelection_ms_max = 500", "the spread decides elections"),
    ("[limits]\ndeadline_ms_default = 70000", "above limits.deadline_ms_max"),
    ("[limits]\nbodies_bytes_max = 2048", "never be taken"),
    ("[embedding]\ndim = 768", "must be 384"),
    ('[cluster]\nca_cert = "ca.pem"', "missing: cluster.cert, cluster.key"),
    ('[[security.api_keys]]\ntenant = "a"', "either key_hash or key_env"),
    (f'[[security.api_keys]]\nkey_hash = "{HASH}"\nkey_env = "X"', "either key_hash or key_env"),
    ('[[security.api_keys]]\nkey_hash = "secret"', "must be a SHA-256"),
]


@pytest.mark.parametrize(("toml", "text"), WRONG)
def test_what_is_wrong_stops_the_start_and_is_named(tmp_path: Path, toml: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        read(tmp_path, toml)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AGENTMEM_LIMITS_TOPK_MAX", "Did you mean AGENTMEM_LIMITS_TOP_K_MAX?"),
        ("AGENTMEM_TYPO", "no setting"),
    ],
)
def test_an_unknown_variable_stops_the_start(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        read(environment={variable: "1"})


@pytest.mark.parametrize(
    "variable",
    [
        "AGENTMEM_URL",
        "AGENTMEM_API_KEY",
        "AGENTMEM_KEY_ANA",
        "AGENTMEM_SERVICE_HOST",
        "AGENTMEM_PORT_7700_TCP_ADDR",
        "AGENTMEM_NODES_SERVICE_PORT_HTTP",
        "PATH",
    ],
)
def test_variables_of_others_are_left_alone(variable: str) -> None:
    read(environment={variable: "anything"})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(tmp_path / "none.toml", {})


def test_a_node_beyond_loopback_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="agentmem key new"):
        check_startup(read(node__listen="0.0.0.0:7700"))
    key = [{"key_hash": HASH}]
    check_startup(read(node__listen="0.0.0.0:7700", security__api_keys=key))
    with pytest.raises(ConfigError, match=r"security\.require is false"):
        check_startup(
            read(node__listen="0.0.0.0:7700", security__api_keys=key, security__require=False)
        )


def test_a_link_beyond_loopback_needs_certificates() -> None:
    nodes = {
        "n1": {"peer": "10.0.0.1:8701", "http": "http://10.0.0.1:7700"},
        "n2": {"peer": "10.0.0.2:8701", "http": "http://10.0.0.2:7700"},
    }
    config = read(cluster__nodes=nodes)
    assert config.peer_listen == "10.0.0.1:8701"
    with pytest.raises(ConfigError, match=r"cluster\.ca_cert"):
        check_startup(config)
    files = {name: f"{name}.pem" for name in ("ca_cert", "cert", "key")}
    named = {f"cluster__{name}": file for name, file in files.items()}
    check_startup(read(cluster__nodes=nodes, **named))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_shard_has_at_most_one_copy_a_node(size: int) -> None:
    nodes = {f"n{number}": {"peer": f"127.0.0.1:{8700 + number}"} for number in range(1, size + 1)}
    assert read(cluster__nodes=nodes).replicas == min(3, size)


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_key_is_explained(name: str) -> None:
    key = KEYS[name]
    assert len(key.meaning) > 10
    assert key.meaning[0].isupper() or key.meaning[0] in "`0123456789"
    assert key.meaning.rstrip().endswith((".", "`"))
    shown = str(load(environment={}).explain(name))
    for part in (name, key.meaning, key.variable, key.allowed):
        assert part in shown


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_key_is_documented(name: str) -> None:
    assert f"\n### {name}\n" in (ROOT / "docs" / "configuration.md").read_text()


def test_docs_configuration_is_made_from_the_keys() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run: python -m agentmem_node.config --markdown > docs/configuration.md"
    )


def test_an_unknown_key_is_explained_with_a_near_one() -> None:
    with pytest.raises(ConfigError, match=r"limits\.top_k_max"):
        load(environment={}).explain("limits.topk_max")


SIMPLE = [name for name, key in KEYS.items() if isinstance(key.default, int | str | float)]


@given(st.sampled_from(SIMPLE))
def test_a_default_written_into_a_variable_means_the_default(name: str) -> None:
    key = KEYS[name]
    text = (
        key.default if isinstance(key.default, str) else msgspec.json.encode(key.default).decode()
    )
    settings = load(environment={key.variable: text})
    assert settings.config == Config()
    assert settings.sources[name] == f"environment {key.variable}"


@given(st.text(max_size=30))
def test_an_address_is_understood_or_refused_never_misread(text: str) -> None:
    try:
        host, port = split_address(text)
    except ConfigError:
        return
    assert 0 <= port <= 65_535
    assert text in (f"{host}:{text.rpartition(':')[2]}", f"[{host}]:{text.rpartition(':')[2]}")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("localhost.example:1", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_sections_are_documented_as_well() -> None:
    for section in SECTIONS.values():
        assert section.__doc__
