"""A member of a cluster whose certificates are wrong says which, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem_cluster.link.ca import create_ca, issue
from agentmem_node.config import ConfigError
from agentmem_node.config_keys import ClusterSection
from agentmem_node.service.certificates import load_certificates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    create_ca(folder, "north")
    for node in ("n1", "n2"):
        issue(folder, node)
    return folder


def section(folder: Path, **files: str) -> ClusterSection:
    names = {"ca_cert": "ca.crt", "cert": "n1.crt", "key": "n1.key"} | files
    return ClusterSection(name="north", **{key: str(folder / name) for key, name in names.items()})


def test_the_files_of_the_command_let_a_node_in(folder: Path) -> None:
    assert load_certificates(section(folder), "n1").identity.node_id == "n1"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ca_cert": "none.crt"}, "Cannot read cluster.ca_cert"),
        ({"cert": "none.crt"}, "Cannot read cluster.cert"),
        ({"key": "none.key"}, "Cannot read cluster.key"),
        ({"key": "n2.key"}, "are not an authority"),
        ({"ca_cert": "n1.key"}, "are not an authority"),
        ({"cert": "n2.crt", "key": "n2.key"}, "names agentmem://north/n2, not"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_certificates(section(folder, **files), "n1")


def test_without_certificates_the_command_that_makes_them_is_named() -> None:
    with pytest.raises(ConfigError, match="agentmem cluster certs"):
        load_certificates(ClusterSection(), "n1")
