"""`config`, `key`, `version`, `doctor` and the help texts."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from agentmem_node.cli import checks
from agentmem_node.cli.app import cli, run
from agentmem_node.cli.checks import Verdict
from agentmem_node.cli.exits import MEANINGS, Exit
from agentmem_node.config import KEYS, load
from agentmem_node.security.keys import hash_key


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_help_with_an_example(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: agentmem" in shown
    if "COMMAND" not in shown and path != ("version",):
        assert f"  agentmem {' '.join(path)}" in shown or "| agentmem" in shown


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_is_documented(path: tuple[str, ...]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert f"agentmem {' '.join(path)}" in text


def test_every_exit_code_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for code in Exit:
        assert f"| {int(code)} | {MEANINGS[code]} |" in text


def test_a_setting_is_explained_with_its_origin(
    agentmem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.toml"
    path.write_text("[limits]\ntop_k_max = 50\n")
    explained = agentmem("config", "explain", "limits.top_k_max", "--config", str(path))
    assert (explained.json["value"], explained.json["source"]) == (50, str(path))
    monkeypatch.setenv("AGENTMEM_LIMITS_TOP_K_MAX", "60")
    shown = agentmem("config", "explain", "limits.top_k_max", terminal=True).out
    assert "60" in shown and "AGENTMEM_LIMITS_TOP_K_MAX" in shown


def test_an_unknown_setting_is_not_found_and_the_nearest_is_named(agentmem: Any) -> None:
    unknown = agentmem("config", "explain", "limits.topk")
    assert unknown.code == Exit.NOT_FOUND
    assert "limits.top_k_max" in unknown.err


def test_all_settings_are_listed(agentmem: Any) -> None:
    assert [item["key"] for item in agentmem("config", "list").json] == list(KEYS)
    assert "limits.top_k_max" in agentmem("config", "list", terminal=True).out


def test_a_new_key_is_shown_once_with_a_line_that_lets_it_in(agentmem: Any, tmp_path: Path) -> None:
    made = agentmem("key", "new", "--tenant", "acme/shop").json
    assert hash_key(made["key"]).hex() == made["key_hash"]
    path = tmp_path / "node.toml"
    path.write_text(f"[security]\napi_keys = [{made['toml']}]\n")
    (entry,) = load(path, environment={}).config.security.api_keys
    assert (entry.tenant, entry.key_hash) == ("acme/shop", made["key_hash"])
    assert made["key"] not in made["toml"]
    assert agentmem("key", "new", "--tenant", "no/such/tenant").code == Exit.USAGE


def test_a_key_is_an_admin_only_when_asked_for(agentmem: Any, tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    for options, is_admin in (((), False), (("--admin",), True)):
        made = agentmem("key", "new", *options).json
        path.write_text(f"[security]\napi_keys = [{made['toml']}]\n")
        (entry,) = load(path, environment={}).config.security.api_keys
        assert (entry.admin, made["admin"]) == (is_admin, is_admin)


def test_certificates_are_made_for_every_node_and_missing_ones_are_added(
    agentmem: Any, tmp_path: Path
) -> None:
    out = tmp_path / "certs"
    made = agentmem("cluster", "certs", "--nodes", "n1, n2", "--out", str(out), "--name", "prod")
    assert made.code == Exit.OK
    before = (out / "n1.crt").read_bytes()
    again = ("cluster", "certs", "--nodes", "n1,n3", "--out", str(out))
    assert agentmem(*again).code == Exit.USAGE  # the authority is that of another cluster
    assert agentmem(*again, "--name", "prod").code == Exit.OK
    assert (out / "n1.crt").read_bytes() == before
    assert (out / "n3.key").stat().st_mode & 0o077 == 0
    path = tmp_path / "node.toml"
    path.write_text(made.out.split("# node n2")[0])
    config = load(path, environment={}).config
    assert (config.cluster.name, config.cluster.cert) == ("prod", str(out / "n1.crt"))
    assert agentmem("cluster", "certs", "--nodes", "N1", "--out", str(out)).code == Exit.USAGE


def test_versions_are_told(agentmem: Any) -> None:
    assert re.match(r"\d+\.\d+", agentmem("version").json["python"])
    assert "pysyncobj" in agentmem("version", terminal=True).out


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    program = (
        "import sys; sys.modules['click'] = None\nfrom agentmem_node.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == Exit.FAILED
    assert "'click'" in done.stderr and "agentmem-cluster[node]" in done.stderr
    assert "Traceback" not in done.stderr


# -- doctor -----------------------------------------------------------------------------------


def config_for(tmp_path: Path, **settings: Any) -> Any:
    overrides = {"node.data_dir": str(tmp_path / "data"), "embedding.provider": "none"} | settings
    return load(None, environment={}, overrides=overrides).config


def test_doctor_finds_nothing_wrong_here_and_leaves_nothing_behind(
    agentmem: Any, tmp_path: Path
) -> None:
    arguments = ("doctor", "--data", str(tmp_path), "--set", "embedding.provider=none")
    found = agentmem(*arguments, "--listen", "127.0.0.1:0")
    verdicts = {check["name"]: check["verdict"] for check in found.json["checks"]}
    assert found.code == Exit.OK
    assert "fail" not in verdicts.values()
    assert len(verdicts) == len(checks.CHECKS)
    assert list(tmp_path.iterdir()) == []
    assert "what to do" in agentmem(*arguments, terminal=True).out


def test_every_finding_that_is_not_ok_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_sync(_fd: int) -> None:
        clock[0] += 0.2

    clock = [0.0]
    monkeypatch.setattr(os, "fdatasync", slow_sync, raising=False)
    monkeypatch.setattr(checks.time, "perf_counter", lambda: clock[0])
    slow = checks.check_fsync(config_for(tmp_path))
    monkeypatch.undo()
    full = checks.check_disk(config_for(tmp_path, **{"limits.disk_free_bytes_min": 1 << 60}))
    exposed = checks.check_settings(config_for(tmp_path, **{"node.listen": "0.0.0.0:7700"}))
    elsewhere = checks.check_ports(config_for(tmp_path, **{"node.listen": "192.0.2.1:7700"}))
    for finding in (slow, full, exposed, elsewhere):
        assert finding.verdict is Verdict.FAIL, finding
        assert finding.advice
    assert "SSD" in slow.advice and "agentmem key new" in exposed.advice


def test_a_port_in_use_is_a_warning_for_it_may_be_this_node(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        address = f"127.0.0.1:{held.getsockname()[1]}"
        found = checks.check_ports(config_for(tmp_path, **{"node.listen": address}))
    assert found.verdict is Verdict.WARN and address in found.found


def test_a_directory_that_cannot_be_written_fails_both_disk_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)

    def refused(**_options: Any) -> Any:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "mkstemp", refused)
    assert checks.check_disk(config_for(tmp_path)).verdict is Verdict.FAIL
    assert checks.check_fsync(config_for(tmp_path)).verdict is Verdict.FAIL


def test_a_missing_model_is_a_warning_that_names_the_command(tmp_path: Path) -> None:
    config = config_for(
        tmp_path, **{"embedding.provider": "minilm", "embedding.model_dir": str(tmp_path)}
    )
    found = checks.check_model(config)
    assert found.verdict is Verdict.WARN
    assert "agentmem_node.providers.fetch" in found.advice
