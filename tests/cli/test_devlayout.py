"""The files of a development cluster are ones that a node accepts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agentmem_node.cli.devlayout import (
    HOST,
    DevClusterError,
    free_port,
    is_free,
    layout,
    ports_in_use,
    prepare,
)
from agentmem_node.config import check_startup, load


def test_every_node_gets_a_configuration_that_it_accepts(tmp_path: Path) -> None:
    nodes = layout(tmp_path, 3, 21_000)
    prepare(tmp_path, nodes, "dev", {"raft.heartbeat_ms": 40, "search.legs": {"bm25": 1.5}})
    for node in nodes:
        config = load(node.config, environment={}).config
        check_startup(config)
        assert config.node.id == node.id
        assert config.node.listen == f"{HOST}:{node.port}"
        assert config.raft.heartbeat_ms == 40
        assert config.search.legs == {"bm25": 1.5}
        assert {name: peer.http for name, peer in config.cluster.nodes.items()} == {
            n.id: n.url for n in nodes
        }
        for path in (config.cluster.ca_cert, config.cluster.cert, config.cluster.key):
            assert path is not None and Path(path).is_file()


def test_a_single_node_needs_no_certificates_and_no_link(tmp_path: Path) -> None:
    nodes = layout(tmp_path, 1, 21_000)
    prepare(tmp_path, nodes, "dev", {})
    config = load(nodes[0].config, environment={}).config
    assert config.peer_listen is None
    assert not (tmp_path / "ca").exists()


def test_a_second_start_keeps_the_certificates_and_may_use_other_ports(tmp_path: Path) -> None:
    prepare(tmp_path, layout(tmp_path, 3, 21_000), "dev", {})
    before = (tmp_path / "ca" / "n1.crt").read_bytes()
    nodes = layout(tmp_path, 3, 22_000)
    prepare(tmp_path, nodes, "dev", {})
    assert (tmp_path / "ca" / "n1.crt").read_bytes() == before
    assert load(nodes[0].config, environment={}).config.node.listen == f"{HOST}:22000"


def test_a_directory_of_another_size_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path, layout(tmp_path, 3, 21_000), "dev", {})
    with pytest.raises(DevClusterError, match="--nodes 3"):
        prepare(tmp_path, layout(tmp_path, 5, 21_000), "dev", {})


def test_a_path_with_quotes_and_spaces_is_written_so_that_it_is_read_back(tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" \\ dir ü'
    nodes = layout(odd, 1, 21_000)
    prepare(odd, nodes, "dev", {})
    config = load(nodes[0].config, environment={}).config
    assert Path(config.node.data_dir) == (odd / "n1" / "data").absolute()


def test_a_port_in_use_is_seen_before_anything_starts() -> None:
    port = free_port(3)
    nodes = layout(Path(), 3, port)
    assert ports_in_use(nodes) == []
    with socket.socket() as held:
        held.bind((HOST, port + 101))  # the link of n2
        held.listen()
        assert not is_free(port + 101)
        assert ports_in_use(nodes) == [port + 101]


@pytest.mark.parametrize(("nodes", "port"), [(0, 7700), (101, 7700), (3, 65_500), (1, 0)])
def test_impossible_sizes_and_ports_are_refused(nodes: int, port: int) -> None:
    with pytest.raises(DevClusterError):
        layout(Path(), nodes, port)
