"""docs/operations.md names commands, settings, series and codes that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import pytest

from agentmem_cluster import errors
from agentmem_node.cli.app import cli
from agentmem_node.config import KEYS, load
from agentmem_node.observe.metrics import InFlight, Metrics
from agentmem_node.observe.snapshot import (
    CacheSnapshot,
    GroupSnapshot,
    NodeSnapshot,
    PeerSnapshot,
    ShardSnapshot,
)

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()
SECTIONS = {name.partition(".")[0] for name in KEYS}


def test_every_setting_named_exists() -> None:
    named = set(re.findall(rf"`((?:{'|'.join(sorted(SECTIONS))})\.[a-z_]+)`", TEXT))
    assert len(named) >= 8
    assert named <= set(KEYS)


def test_every_command_named_exists() -> None:
    lines = re.findall(r"(?:`|    )agentmem ([a-z][^`\n]*)", TEXT)
    assert len(lines) > 5
    for line in lines:
        command: click.Command = cli
        words = line.split()
        while words and isinstance(command, click.Group):
            with click.Context(command) as context:
                found = command.get_command(context, words.pop(0))
            assert found is not None, line
            command = found
        options = {option for param in command.params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_every_series_named_exists() -> None:
    snapshot = NodeSnapshot(
        "n1",
        "0",
        groups=[GroupSnapshot("s0", "leader", 1, True, 1, 1, 1)],
        shards=[ShardSnapshot("s0", 1, 1)],
        peers=[PeerSnapshot("n2", True)],
        caches=[CacheSnapshot("embedding", 1, 1)],
        plugin_calls={("p", "ok"): 1},
    )
    metrics = Metrics(lambda: snapshot)
    metrics.watch(lambda: InFlight({}, 0, 0, 0, 0))
    metrics.request("GET", "/", 200, 0.1)
    page = metrics.exposition("default")[1].decode()
    named = set(re.findall(r"`(agentmem_[a-z_]+)", TEXT)) - {"agentmem_cluster"}
    assert len(named) > 15
    for name in named:
        assert re.search(rf"^{name}(_bucket)?({{| )", page, re.MULTILINE), name


def test_every_error_code_named_exists() -> None:
    codes = {kind.code for kind in vars(errors).values() if hasattr(kind, "code")}
    named = set(re.findall(r"\b[45]\d\d\s+`([a-z_]+)`", TEXT))
    assert len(named) >= 3
    assert named <= codes


def test_the_example_of_a_cluster_is_a_valid_configuration(tmp_path: Path) -> None:
    (block,) = re.findall(r"For real, one file a node:\n\n((?:    .*\n|\n)+)", TEXT)
    toml = re.sub(r"^    ", "", block, flags=re.MULTILINE).replace('"..."', f'"{"ab" * 32}"')
    tomllib.loads(toml)
    path = tmp_path / "node.toml"
    path.write_text(toml)
    config = load(path, {}).config
    assert config.replicas == 3
    assert config.peer_listen == "0.0.0.0:7800"


@pytest.mark.parametrize("name", ["configuration.md", "http-api.md", "cli.md"])
def test_linked_pages_exist(name: str) -> None:
    assert name in TEXT
    assert (ROOT / "docs" / name).exists()
