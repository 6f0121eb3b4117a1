"""What `agentmem serve --join` refuses before it asks anybody."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agentmem_cluster.realtime import RealRng
from agentmem_node.cli.join_tokens import seconds_of
from agentmem_node.service.join_client import has_joined
from agentmem_node.service.join_tokens import JoinToken
from tests.join.conftest import AGENTMEM

pytestmark = pytest.mark.process
GOOD = ("--at", "127.0.0.1:9", "--id", "n4", "--peer-listen", "127.0.0.1:9999")


def serve(data: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [*AGENTMEM, "serve", "--data", str(data), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (GOOD[2:], "--join needs --at"),
        (GOOD[:2] + GOOD[4:], "--join needs --id"),
        (GOOD[:4], "--join needs --peer-listen"),
        ((*GOOD[:4], "--peer-listen", "0.0.0.0:9999"), "--advertise HOST"),
        ((*GOOD, "--advertise-peer", "no-port"), "--advertise-peer"),
        ((*GOOD, "--listen", "10.0.0.4:7700"), "there is no API key"),
    ],
)
def test_a_join_that_could_not_serve_asks_nobody(
    tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    code, said = serve(tmp_path / "n4", "--join", str(JoinToken.draw(RealRng())), *arguments)
    assert code == 2 and why in said, said
    assert not (tmp_path / "n4").exists()


def test_an_operators_own_settings_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("[node]\nid = 'n1'\n")
    assert not has_joined(tmp_path)
    code, said = serve(tmp_path, "--join", str(JoinToken.draw(RealRng())), *GOOD)
    assert code == 1 and "would be overwritten" in said
    assert (tmp_path / "node.toml").read_text() == "[node]\nid = 'n1'\n"


def test_the_data_of_another_node_is_never_joined(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    code, said = serve(tmp_path, "--join", str(JoinToken.draw(RealRng())), *GOOD)
    assert code == 1 and "holds the data of a node already" in said


def test_settings_in_the_data_directory_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("[cluster")
    code, said = serve(tmp_path)
    assert code == 2 and "cannot be read" in said and "Traceback" not in said


def test_times_are_given_with_a_unit() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1h", "2d")] == [90, 1800, 3600, 172_800]
