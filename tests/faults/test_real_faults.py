"""Real processes, real faults: what the README promises, one fault after another."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem_cluster.ring import slot_of
from agentmem_node.cli.devcluster import DevCluster

pytestmark = pytest.mark.process

SETTINGS = {"embedding.provider": "none", "embedding.dim": 4}
DEADLINE_S = 4.0
# What a request may take beyond its deadline: the answer's way back on a busy machine.
GRACE_S = 3.0


def ask(
    method: str, url: str, document: object = None, headers: dict[str, str] | None = None
) -> Any:
    call = urllib.request.Request(
        url,
        data=None if document is None else json.dumps(document).encode(),
        method=method,
        headers={
            "Content-Type": "application/json",
            "X-AgentMem-Deadline-Ms": str(int(DEADLINE_S * 1000)),
            **(headers or {}),
        },
    )
    with urllib.request.urlopen(call, timeout=DEADLINE_S + GRACE_S) as answer:
        return json.loads(answer.read())


def add(url: str, text: str, owner: str, key: str | None = None) -> str:
    headers = {} if key is None else {"Idempotency-Key": key}
    document = {"content": text, "user_id": owner}
    answer = ask("POST", f"{url}/api/v1/memories", document, headers)
    memory_id: str = answer["results"][0]["id"]
    return memory_id


def status_of(method: str, url: str, document: object = None) -> tuple[int, dict[str, Any]]:
    try:
        return 200, ask(method, url, document)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def wait_for(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    try:
        ask("GET", url + "/health/ready")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with DevCluster(folder, nodes=3, settings=SETTINGS) as running:
        yield running


class Writers:
    """Clients that add and retry under one key, and remember what was acknowledged."""

    def __init__(self, urls: list[str], count: int) -> None:
        self.acknowledged: dict[str, str] = {}
        self.slowest_s = 0.0
        self._urls = urls
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(count)
        ]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _write(self, writer: int) -> None:
        chance = random.Random(writer)
        number = 0
        while not self._stop.is_set():
            number += 1
            text = f"writer {writer} memory {number}"
            while not self._stop.is_set():
                begun = time.monotonic()
                try:
                    memory_id = add(
                        chance.choice(self._urls), text, f"owner-{writer}", text.replace(" ", "-")
                    )
                except OSError as error:
                    if getattr(error, "code", 503) < 500:
                        raise
                    self._stop.wait(0.02)
                    continue
                finally:
                    with self._lock:
                        self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
                with self._lock:
                    self.acknowledged[memory_id] = text
                break


def all_found(url: str, acknowledged: dict[str, str]) -> None:
    for memory_id, text in acknowledged.items():
        found = ask("GET", f"{url}/api/v1/memories/{memory_id}")
        assert found.get("memory", found)["content"] == text


def contents(url: str, owner: str) -> list[str]:
    texts: list[str] = []
    cursor = ""
    while True:
        page = ask("GET", f"{url}/api/v1/memories?user_id={owner}&limit=500{cursor}")
        texts += [memory["content"] for memory in page["results"]]
        if page["next_cursor"] is None:
            return texts
        cursor = f"&cursor={page['next_cursor']}"


def test_killing_any_node_during_writes_loses_nothing_and_repeats_nothing(
    cluster: DevCluster,
) -> None:
    with Writers(cluster.urls, 6) as writers:
        for number in (1, 2, 3):
            time.sleep(1.0)
            cluster.kill(number)
            time.sleep(2.0)
            cluster.restart(number)
            wait_for(lambda: all(map(is_ready, cluster.urls)), 30, "the restarted node")
    assert len(writers.acknowledged) > 100
    assert writers.slowest_s < DEADLINE_S + GRACE_S
    for url in cluster.urls:
        stored = [text for writer in range(6) for text in contents(url, f"owner-{writer}")]
        assert len(stored) == len(set(stored)), "a retried write took effect twice"
        assert set(writers.acknowledged.values()) <= set(stored), "an acknowledged write is lost"


def test_killing_all_nodes_at_once_loses_nothing(cluster: DevCluster) -> None:
    with Writers(cluster.urls, 6) as writers:
        time.sleep(1.5)
        for number in (1, 2, 3):
            cluster.kill(number)
    for number in (1, 2, 3):
        cluster.restart(number, wait_s=0)
    wait_for(lambda: all(map(is_ready, cluster.urls)), 40, "the cluster")
    assert writers.acknowledged
    all_found(cluster.urls[0], writers.acknowledged)


def test_replicas_have_equal_digests_once_writes_stop(cluster: DevCluster) -> None:
    def digests() -> list[dict[str, str]]:
        views = [ask("GET", url + "/api/v1/cluster")["shards"] for url in cluster.urls]
        return [{s: f"{v[s]['applied']} {v[s]['digest']}" for s in v} for v in views]

    def equal() -> bool:
        views = [{s: part.split("}", 1)[1] for s, part in view.items()} for view in digests()]
        return views[0] == views[1] == views[2]

    wait_for(equal, 20, "equal digests")


def test_a_minority_refuses_within_its_time_and_recovers(cluster: DevCluster) -> None:
    known = add(cluster.urls[0], "before the cut", "cut")
    seen = f"{cluster.urls[0]}/api/v1/memories/{known}?consistency=eventual"
    # Two others may have acknowledged it: what is read from the minority below must be there.
    wait_for(lambda: status_of("GET", seen)[0] == 200, 10, "the write on the first node")
    for number in (2, 3):
        cluster.kill(number)
    time.sleep(1.5)  # about one election timeout: the leaders that are left step down
    for method, path, document in (
        ("POST", "/memories", {"content": "x", "user_id": "cut"}),
        ("GET", f"/memories/{known}", None),
        ("POST", "/memories/search", {"query": "before", "user_id": "cut"}),
    ):
        begun = time.monotonic()
        code, body = status_of(method, cluster.urls[0] + "/api/v1" + path, document)
        assert code in (503, 504), body
        assert body["code"] in ("no_quorum", "not_leader", "deadline_exceeded"), body
        assert time.monotonic() - begun < DEADLINE_S + GRACE_S
    eventual = ask("GET", seen)
    assert eventual.get("memory", eventual)["content"] == "before the cut"
    for number in (2, 3):
        cluster.restart(number, wait_s=0)
    wait_for(lambda: all(map(is_ready, cluster.urls)), 40, "the cluster")
    all_found(cluster.urls[0], {known: "before the cut"})


def test_a_frozen_leader_is_replaced_and_does_not_serve_stale_reads(cluster: DevCluster) -> None:
    memory_id = add(cluster.urls[0], "version one", "frozen")
    slot = slot_of("default", "user:frozen")
    shards = ask("GET", cluster.urls[0] + "/api/v1/cluster")["shards"].values()
    (leader,) = (s["leader"] for s in shards if s["slots"][0][0] <= slot <= s["slots"][0][1])
    victim = int(leader[1:])
    others = [url for number, url in enumerate(cluster.urls, 1) if number != victim]
    cluster.pause(victim)
    try:
        changed = False
        deadline = time.monotonic() + 20
        while not changed and time.monotonic() < deadline:
            try:
                ask("PATCH", f"{others[0]}/api/v1/memories/{memory_id}", {"content": "version two"})
                changed = True
            except OSError:
                time.sleep(0.1)
        assert changed
    finally:
        cluster.resume(victim)
    code, body = status_of("GET", f"{cluster.urls[victim - 1]}/api/v1/memories/{memory_id}")
    assert code in (200, 503, 504)
    if code == 200:
        assert body.get("memory", body)["content"] == "version two"


# -- one node and its disk --------------------------------------------------------------------


class Single:
    """One node whose data directory a test may damage."""

    def __init__(self, data: Path, port: int, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = data.parent / f"{data.name}.log"
        self._command = [
            sys.executable,
            "-m",
            "agentmem_node.cli.main",
            "serve",
            "--data",
            str(data),
            "--listen",
            f"127.0.0.1:{port}",
        ]
        self._environment = {**os.environ, "AGENTMEM_EMBEDDING_PROVIDER": "none", **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment
            )
        wait_for(lambda: is_ready(self.url), 30, "the start")

    def start_fails(self) -> str:
        done = subprocess.run(
            self._command, env=self._environment, timeout=60, capture_output=True, text=True
        )
        assert done.returncode not in (0, None)
        return done.stdout + done.stderr

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def newest_segment(data: Path) -> Path:
    return max((data / "journal").glob("*.seg"))


def test_a_torn_journal_tail_is_cut_and_nothing_acknowledged_is_lost(
    tmp_path: Path, free_port: int
) -> None:
    node = Single(tmp_path / "data", free_port)
    node.start()
    try:
        acknowledged = {add(node.url, f"memory {n}", "ana"): f"memory {n}" for n in range(40)}
        node.kill()
        segment = newest_segment(tmp_path / "data")
        data = segment.read_bytes()
        end = len(data.rstrip(b"\0"))
        # What a write that the kill interrupted leaves behind: noise after the last batch.
        with segment.open("r+b") as file:
            file.seek((end + 7) // 8 * 8)
            file.write(random.Random(1).randbytes(300))
        node.start()
        all_found(node.url, acknowledged)
        add(node.url, "after the recovery", "ana")
    finally:
        node.kill()


def test_damage_within_the_journal_is_refused_loudly(tmp_path: Path, free_port: int) -> None:
    node = Single(tmp_path / "data", free_port, AGENTMEM_STORAGE_CHECKPOINT_MS="600000")
    node.start()
    try:
        for n in range(60):
            add(node.url, f"memory {n} " + "x" * 200, "ana")
        node.kill()
        segment = newest_segment(tmp_path / "data")
        data = bytearray(segment.read_bytes())
        data[data.index(b"memory 30 xxx") + 9] ^= 0x40
        segment.write_bytes(data)
        said = node.start_fails()
        assert segment.name in said
        assert "Traceback" not in said
    finally:
        node.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_refuses_writes_serves_reads_and_recovers_by_itself(
    tmp_path: Path, free_port: int
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode()[:200]}")
    node = Single(
        small / "data",
        free_port,
        AGENTMEM_LIMITS_DISK_FREE_BYTES_MIN="0",
        AGENTMEM_STORAGE_JOURNAL_SEGMENT_BYTES=str(4 << 20),
    )
    node.log = tmp_path / "node.log"
    try:
        node.start()
        acknowledged = {add(node.url, f"memory {n}", "ana"): f"memory {n}" for n in range(20)}
        free = os.statvfs(small)
        ballast = small / "ballast"
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(b"x" * 65_536)
            except OSError:
                pass
        assert os.statvfs(small).f_bavail < free.f_bavail
        refused: dict[str, Any] = {}
        deadline = time.monotonic() + 30
        number = 20
        while not refused and time.monotonic() < deadline:
            text = f"memory {number} " + "y" * 20_000
            code, body = status_of(
                "POST", node.url + "/api/v1/memories", {"content": text, "user_id": "ana"}
            )
            if code == 200:
                acknowledged[body["results"][0]["id"]] = text
                number += 1
            else:
                assert code in (503, 504), body
                refused = body if code == 503 else {}
        assert refused["code"] == "disk_full", refused
        all_found(node.url, dict(list(acknowledged.items())[:20]))  # reads go on
        ballast.unlink()

        def writes_again() -> bool:
            document = {"content": "after", "user_id": "ana"}
            return status_of("POST", node.url + "/api/v1/memories", document)[0] == 200

        wait_for(writes_again, 20, "the recovery without a restart")
        all_found(node.url, acknowledged)
        node.kill()
        node.start()
        all_found(node.url, acknowledged)
    finally:
        node.kill()
        subprocess.run(["umount", "-l", str(small)], check=False, capture_output=True)
