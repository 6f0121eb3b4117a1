"""A development cluster of real processes: start, kill, restart, resume, and no orphans."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentmem_client as client
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.devlayout import HOST, DevClusterError, free_port
from agentmem_node.cli.exits import Exit

pytestmark = pytest.mark.process

# Words are enough for these tests, and the model would cost each node a second.
LEXICAL = {"embedding.provider": "none", "embedding.dim": 0, "cluster.shards": 4}
AGENTMEM = [sys.executable, "-m", "agentmem_node.cli.main"]
START_S_MAX = 60.0


def wait_for(condition: Callable[[], Any], seconds: float = START_S_MAX) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not looked yet is dead enough.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    with DevCluster(tmp_path_factory.mktemp("dev"), settings=LEXICAL) as made:
        yield made


@pytest.fixture
def memory(cluster: DevCluster) -> Iterator[client.Client]:
    for node in cluster.nodes:
        if not cluster.is_running(node.id):
            cluster.restart(node.id)
    with client.Client(cluster.urls) as made:
        yield made


def leader_of(memory: client.Client, user: str) -> str:
    def known() -> str | None:
        shard = memory.cluster().shard_of_owner(f"user:{user}")
        return shard.leader if shard else None

    return str(wait_for(known))


def test_what_is_added_is_found_through_every_node(
    cluster: DevCluster, memory: client.Client
) -> None:
    (stored,) = memory.add("Ana likes oolong tea", user_id="ana").memories
    for url in cluster.urls:
        with client.Client(url) as one:
            assert one.get(stored.id).content == "Ana likes oolong tea"
            assert stored.id in {hit.id for hit in one.search("oolong", user_id="ana")}


def test_writes_and_searches_go_on_when_their_leader_is_killed(
    cluster: DevCluster, memory: client.Client
) -> None:
    before = memory.add_many(
        [{"content": f"Parcel A{i} is on shelf {i}", "user_id": "ben"} for i in range(20)]
    ).memories
    leader = leader_of(memory, "ben")
    cluster.kill(leader)
    after = [memory.add(f"Parcel B{i} came", user_id="ben").memories[0] for i in range(20)]
    assert cluster.crashes() == []  # it was told to die: that is no crash
    assert memory.search("parcel B7", user_id="ben").results
    cluster.restart(leader)
    with client.Client(cluster.node(leader).url) as returned:
        for stored in (*before, *after):
            assert returned.get(stored.id).content == stored.content


def test_a_retried_write_over_a_leader_kill_takes_effect_once(
    cluster: DevCluster, memory: client.Client
) -> None:
    leader = leader_of(memory, "cleo")
    memory.add("Cleo moved to Bergen", user_id="cleo", idempotency_key="move")
    cluster.kill(leader)
    repeated = memory.add("Cleo moved to Bergen", user_id="cleo", idempotency_key="move")
    found = [m.id for m in memory.list(user_id="cleo")]
    assert found == [m.id for m in repeated.memories]


def test_a_paused_node_costs_less_than_the_deadline(
    cluster: DevCluster, memory: client.Client
) -> None:
    leader = leader_of(memory, "dev")
    cluster.pause(leader)
    try:
        begun = time.monotonic()
        assert memory.add("Dev paints fences", user_id="dev").memories
        assert time.monotonic() - begun < 10.0
    finally:
        cluster.resume(leader)


def test_a_minority_refuses_rather_than_lie(cluster: DevCluster, memory: client.Client) -> None:
    (stored,) = memory.add("Eli has two goats", user_id="eli").memories
    cluster.kill(1)
    cluster.kill(2)
    with pytest.raises(client.TemporarilyUnavailable):
        memory.add("Eli has three goats", user_id="eli", deadline_s=3.0)
    with pytest.raises(client.TemporarilyUnavailable):
        memory.get(stored.id, deadline_s=3.0)
    cluster.restart(1)
    assert memory.get(stored.id).content == "Eli has two goats"


def test_a_node_that_dies_by_itself_is_reported_with_its_log(
    cluster: DevCluster, memory: client.Client
) -> None:
    os.kill(cluster.pid(3), signal.SIGKILL)  # not through `cluster.kill`: nobody expects it
    (crash,) = wait_for(cluster.crashes)
    assert crash.node == "n3" and "SIGKILL" in str(crash)
    assert cluster.crashes() == []


def test_a_node_stops_cleanly_on_sigterm(cluster: DevCluster, memory: client.Client) -> None:
    assert cluster.terminate(2) == 0
    cluster.restart(2)


def test_the_status_shows_who_is_down(cluster: DevCluster, memory: client.Client) -> None:
    cluster.kill(3)
    command = [*AGENTMEM, "cluster", "status", "--url", cluster.urls[0]]

    def settled() -> Any:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        state = json.loads(done.stdout) if done.stdout else None
        # Right after the kill some shards have no leader yet.
        has_leaders = state and all(shard["leader"] in ("n1", "n2") for shard in state["shards"])
        return (done.returncode, state) if has_leaders else None

    code, state = wait_for(settled, 20.0)
    assert code == Exit.UNAVAILABLE and not state["healthy"]
    assert {node["id"]: node["up"] for node in state["nodes"]} == {
        "n1": True,
        "n2": True,
        "n3": False,
    }


# -- the command ------------------------------------------------------------------------------


def start_command(data: Path, port: int, *more: str) -> subprocess.Popen[str]:
    settings = [f"--set={name}={value}" for name, value in LEXICAL.items()]
    return subprocess.Popen(
        [*AGENTMEM, "cluster", "dev", "--data", str(data), "--port", str(port), *settings, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal starts it: Ctrl-C goes to the whole group.
        start_new_session=True,
    )


def node_pids(process: subprocess.Popen[str]) -> list[int]:
    """Reads the command's lines until it says that the cluster is ready."""
    assert process.stdout is not None
    pids = []
    for line in process.stdout:
        if " pid " in line:
            pids.append(int(line.split(" pid ")[1].split()[0]))
        if "Ctrl-C" in line:
            break
    return pids


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)


def test_ctrl_c_stops_every_node_and_a_second_start_goes_on_with_the_data(tmp_path: Path) -> None:
    port = free_port(3)
    first = start_command(tmp_path, port)
    try:
        pids = node_pids(first)
        assert len(pids) == 3
        with client.Client(f"{HOST}:{port}") as memory:
            (stored,) = memory.add("Fay plays the oboe", user_id="fay").memories
        os.killpg(first.pid, signal.SIGINT)
        out, err = first.communicate(timeout=30)
        assert first.returncode == Exit.OK, err
        assert "Traceback" not in out + err
        assert not any(is_alive(pid) for pid in pids)
    finally:
        end(first)
    second = start_command(tmp_path, port)
    try:
        assert len(node_pids(second)) == 3
        with client.Client(f"{HOST}:{port + 2}") as memory:
            assert memory.get(stored.id).content == "Fay plays the oboe"
    finally:
        os.killpg(second.pid, signal.SIGINT)
        second.communicate(timeout=30)
        end(second)


def test_nodes_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    process = start_command(tmp_path, free_port(1), "--nodes", "1")
    try:
        pids = node_pids(process)
        assert len(pids) == 1
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not any(is_alive(pid) for pid in pids), 20.0)
    finally:
        end(process)


def test_a_port_in_use_is_a_clear_error_before_anything_starts(tmp_path: Path) -> None:
    port = free_port(3)
    with socket.socket() as held:
        held.bind((HOST, port + 2))
        held.listen()
        process = start_command(tmp_path / "dev", port)
        _, err = process.communicate(timeout=20)
    assert process.returncode == Exit.FAILED
    assert str(port + 2) in err and "in use" in err and "--port" in err
    assert not (tmp_path / "dev").exists()


def test_a_start_that_fails_leaves_no_node_behind(tmp_path: Path) -> None:
    broken = DevCluster(tmp_path, settings=LEXICAL)
    # One node's certificate is damaged: it ends while the others start.
    broken.start()
    broken.stop()
    (tmp_path / "ca" / "n2.crt").write_text("no certificate")
    with pytest.raises(DevClusterError, match="n2"), broken:
        raise AssertionError("it must not get here")
    assert not any(broken.is_running(node.id) for node in broken.nodes)


def test_a_single_node_serves_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port(1)
    process = subprocess.Popen(
        [
            *AGENTMEM,
            *("serve", "--data", str(tmp_path / "data"), "--listen", f"{HOST}:{port}"),
            *("--set", "embedding.provider=none", "--set", "embedding.dim=0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:

        def is_ready() -> bool:
            connection = http.client.HTTPConnection(HOST, port, timeout=1)
            try:
                connection.request("GET", "/health/ready")
                return connection.getresponse().status == 200
            except OSError:
                return False
            finally:
                connection.close()

        wait_for(is_ready)
        with client.Client(f"{HOST}:{port}") as memory:
            assert memory.add("Gus bakes", user_id="gus").memories
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert f"http://{HOST}:{port}" in out
        assert "Traceback" not in out + err
    finally:
        end(process)
