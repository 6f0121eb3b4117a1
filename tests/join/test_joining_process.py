"""A node joins a running cluster with a token: real processes, and a man between them."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import stat
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from agentmem_cluster.link.ca import create_ca, issue
from agentmem_cluster.realtime import RealRng
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.devlayout import HOST, free_port
from agentmem_node.config_file import to_toml
from agentmem_node.service.join_tokens import JoinToken
from tests.join.conftest import AGENTMEM, LEXICAL, Newcomer, Site, ask, join_token, wait_for

pytestmark = pytest.mark.process

API = "/api/v1"
# Enough that each of the four shards has some.
USERS = [f"user-{number}" for number in range(12)]


@contextmanager
def between(url: str, change: Callable[[bytes], bytes]) -> Iterator[str]:
    """The URL of somebody who passes requests on to `url`, and changes the answers."""
    there = urlsplit(url).netloc

    class Man(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            onward = http.client.HTTPConnection(there, timeout=20)
            try:
                onward.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = onward.getresponse()
                data = change(answer.read())
            finally:
                onward.close()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Man)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def serves(newcomer: Newcomer, others: list[str]) -> None:
    """Everything goes through a node without a shard, and what it wrote is everywhere."""
    ids = {}
    for user in USERS:
        body = {"content": f"{user} drinks tea", "user_id": user}
        status, answer = ask(newcomer.url, "POST", f"{API}/memories", body)
        assert status == 201, answer
        ids[user] = answer["results"][0]["id"]
    for user, memory in ids.items():
        for url in (newcomer.url, *others):
            status, answer = ask(url, "GET", f"{API}/memories/{memory}")
            assert (status, answer["memory"]["user_id"]) == (200, user)
    status, found = ask(
        newcomer.url, "POST", f"{API}/memories/search", {"query": "tea", "user_id": USERS[0]}
    )
    assert status == 200 and ids[USERS[0]] in {hit["id"] for hit in found["results"]}


def test_a_node_joins_serves_and_comes_back_without_the_token(
    cluster: DevCluster, site: Site
) -> None:
    token = join_token(cluster.urls[0])
    first = site.join("n4", token, cluster.urls[1])
    wait_for(first.is_ready)
    serves(first, cluster.urls)
    for name in ("node.key", "node.crt", "ca.crt", "node.toml"):
        assert stat.S_IMODE((first.data / name).stat().st_mode) == 0o600
    assert token not in (first.data / "node.toml").read_text()
    assert "has joined" in first.stop()
    # Nodes that restart know it, though their own files do not list it.
    cluster.terminate(1)
    cluster.restart(1)
    again = site.serve("n4")
    wait_for(again.is_ready)
    serves(again, cluster.urls)
    again.stop()
    # As a service is restarted: with all that it was given the first time.
    third = site.join("n4", token, cluster.urls[1])
    wait_for(third.is_ready)
    assert "has joined already" in third.stop()


def test_a_node_that_is_not_let_in_is_told_why(cluster: DevCluster, site: Site) -> None:
    url = cluster.urls[0]
    stranger = str(JoinToken.draw(RealRng()))
    short = join_token(url, "--ttl", "1s")
    for_n9 = join_token(url, "--node", "n9")
    used = join_token(url)
    user = site.join("n5", used, url)
    wait_for(user.is_ready)
    wait_for(lambda: "expired" in _refusal(site, "late", short, url), 20)
    for name, token, node_id, why in (
        ("stranger", stranger, "n6", "no such join token"),
        ("bound", for_n9, "n6", "lets node n9 in, not n6"),
        ("second", used, "n6", "used up: it has let n5 in"),
        ("taken", join_token(url), "n1", "has a node n1, and it is up"),
        ("typing", used[:-3] + "xxx", "n6", "typing error"),
    ):
        said = _refusal(site, name, token, url, node_id)
        assert why in said, (name, said)
        assert "Traceback" not in said
        assert not (site.folder / name / "node.toml").exists()
    assert user.is_ready()


def test_a_revoked_token_lets_nobody_else_in_and_whom_it_let_in_stays(
    cluster: DevCluster, site: Site
) -> None:
    token = join_token(cluster.urls[0], "--uses", "2")
    token_id = JoinToken.parse(token).id
    user = site.join("m1", token, cluster.urls[1])
    wait_for(user.is_ready)
    tokens = f"{API}/cluster/join-tokens"
    for url in cluster.urls:
        status, answer = ask(url, "GET", tokens)
        (found,) = [one for one in answer["tokens"] if one["id"] == token_id]
        assert (status, found["state"], found["joined"]) == (200, "open", ["m1"])
        assert token not in str(answer) and "key" not in found
    assert ask(cluster.urls[2], "DELETE", f"{tokens}/{token_id}")[0] == 200
    assert "no such join token" in _refusal(site, "late", token, cluster.urls[0])
    status, answer = ask(cluster.urls[0], "DELETE", f"{tokens}/{token_id}")
    assert (status, answer["code"]) == (404, "not_found")
    assert all(one["id"] != token_id for one in ask(cluster.urls[0], "GET", tokens)[1]["tokens"])
    serves(user, cluster.urls)
    _operate(cluster.urls[0], "remove", "m1")


def _refusal(site: Site, name: str, token: str, url: str, node_id: str = "n6") -> str:
    code, said = site.join(name, token, url, node_id=node_id).end()
    assert code != 0, said
    return said


def test_an_answer_that_was_changed_on_the_way_is_noticed_and_the_join_repeated(
    cluster: DevCluster, site: Site
) -> None:
    token = join_token(cluster.urls[0])

    def other_peer(data: bytes) -> bytes:
        answer = json.loads(data)
        payload = json.loads(answer["payload"])
        payload["peers"]["n1"]["peer"] = "127.0.0.1:9"
        answer["payload"] = json.dumps(payload)
        return json.dumps(answer).encode()

    with between(cluster.urls[0], other_peer) as liar:
        code, said = site.join("n7", token, liar).end()
    assert code == 1 and "changed on the way" in said, said
    assert sorted(path.name for path in (site.folder / "n7").iterdir()) == [
        "LOCK",
        "node.key",
        "replicas",
    ]
    # The cluster has counted the use; the same node may ask again, and nobody else.
    assert "used up" in _refusal(site, "thief", token, cluster.urls[0], "n7")
    second = site.join("n7", token, cluster.urls[2])
    wait_for(second.is_ready)
    serves(second, cluster.urls)


def test_what_a_stranger_sends_is_refused(cluster: DevCluster) -> None:
    url = cluster.urls[0]
    request = {"token_id": "0" * 16, "payload": "{}", "proof": "0" * 64}
    status, answer = ask(url, "POST", f"{API}/cluster/join", request)
    assert (status, answer["code"]) == (401, "unauthorized")
    status, answer = ask(url, "POST", f"{API}/cluster/join", request | {"payload": "x" * 17_000})
    assert (status, answer["code"]) == (413, "too_large")
    token = JoinToken.parse(join_token(url))
    status, answer = ask(url, "POST", f"{API}/cluster/join", request | {"token_id": token.id})
    assert (status, answer["code"]) == (401, "unauthorized")


def test_one_node_does_not_work_for_a_flood_of_strangers(cluster: DevCluster) -> None:
    request = {"token_id": "0" * 16, "payload": "{}", "proof": "0" * 64}
    answers = [ask(cluster.urls[2], "POST", f"{API}/cluster/join", request) for _ in range(60)]
    codes = [answer["code"] for _, answer in answers]
    assert codes[0] == "unauthorized" and "overloaded" in codes


def test_a_lost_node_is_replaced_only_by_a_token_that_names_it(
    cluster: DevCluster, site: Site
) -> None:
    url = cluster.urls[0]
    lost = site.join("n8", join_token(url), url)
    wait_for(lost.is_ready)
    lost.stop()
    shutil.rmtree(lost.data)
    wait_for(lambda: "with another disk" in _refusal(site, "n8", join_token(url), url, "n8"), 30)
    shutil.rmtree(lost.data)
    back = site.join("n8", join_token(url, "--node", "n8"), url)
    wait_for(back.is_ready)
    serves(back, cluster.urls)
    assert "knows node n8 with another disk" in back.stop()


# -- who signs --------------------------------------------------------------------------------


def _meta_leader(cluster: DevCluster) -> str:
    def known() -> str | None:
        leader: str | None = ask(cluster.urls[0], "GET", f"{API}/cluster")[1]["meta"]["leader"]
        return leader

    return str(wait_for(known))


def test_one_node_with_the_key_signs_for_all_and_none_is_said(tmp_path: Path, site: Site) -> None:
    without_key = {"AGENTMEM_CLUSTER_CA_KEY": ""}
    with DevCluster(tmp_path / "three", settings=LEXICAL, environment=without_key) as three:
        token = join_token(three.urls[0])
        said = _refusal(site, "n5", token, three.urls[0], "n5")
        assert "cluster.ca_key" in said and "ca.key" in said
        # With a certificate that was made elsewhere nobody has to sign, and the token is unused.
        issue(tmp_path / "three" / "ca", "n5")
        fifth = site.join("n5", token, three.urls[0], *_certificate(tmp_path / "three" / "ca"))
        wait_for(fifth.is_ready)
        assert not (fifth.data / "node.crt").exists()
        serves(fifth, three.urls)
        three.terminate(3)  # which hands its leaderships over: another one has to ask it
        three._environment.clear()
        three.restart(3)
        assert _meta_leader(three) in ("n1", "n2")
        fourth = site.join("n4", join_token(three.urls[0]), three.urls[0])
        wait_for(fourth.is_ready)


def _certificate(folder: Path) -> list[str]:
    files = {"ca_cert": "ca.crt", "cert": "n5.crt", "key": "n5.key"}
    return [f"--set=cluster.{name}={folder / file}" for name, file in files.items()]


def test_a_single_node_with_certificates_can_be_joined(tmp_path: Path, site: Site) -> None:
    create_ca(tmp_path / "ca", "small")
    issue(tmp_path / "ca", "n1")
    port = free_port(1)
    site._ports["n1"] = port
    file = tmp_path / "n1.toml"
    file.write_text(
        to_toml(
            "one node",
            {
                "node.listen": f"{HOST}:{port}",
                "cluster.name": "small",
                "cluster.ca_cert": str(tmp_path / "ca" / "ca.crt"),
                "cluster.ca_key": str(tmp_path / "ca" / "ca.key"),
                "cluster.cert": str(tmp_path / "ca" / "n1.crt"),
                "cluster.key": str(tmp_path / "ca" / "n1.key"),
                "cluster.nodes": {
                    "n1": {"peer": f"{HOST}:{port + 100}", "http": f"http://{HOST}:{port}"}
                },
                "cluster.shards": 4,
                "embedding.provider": "none",
                "embedding.dim": 0,
            },
        )
    )
    only = site.serve("n1", "--config", str(file))
    wait_for(only.is_ready)
    second = site.join("n2", join_token(only.url), only.url)
    wait_for(second.is_ready)
    serves(second, [only.url])
    assert tomllib.loads((second.data / "node.toml").read_text())["cluster"]["name"] == "small"


# -- what follows -----------------------------------------------------------------------------


def _operate(url: str, *arguments: str) -> None:
    done = subprocess.run(
        [*AGENTMEM, "cluster", *arguments, "--yes", "--url", url],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_joined_node_takes_its_share_is_removed_and_joins_again_under_its_name(
    cluster: DevCluster, site: Site
) -> None:
    url = cluster.urls[0]
    first = site.join("m4", join_token(url), url)
    wait_for(first.is_ready)
    serves(first, cluster.urls)
    _operate(url, "rebalance")

    def members() -> set[str]:
        shards = ask(url, "GET", f"{API}/cluster")[1]["shards"].values()
        return {member for shard in shards for member in shard["members"]}

    assert "m4" in members()
    _operate(url, "remove", "m4")
    assert "m4" not in members()
    first.stop()
    shutil.rmtree(first.data)
    assert "was removed" in _refusal(site, "m4", join_token(url), url, "m4")
    shutil.rmtree(first.data)
    again = site.join("m4", join_token(url, "--node", "m4"), url)
    wait_for(again.is_ready)
    serves(again, cluster.urls)
    _operate(url, "rebalance")
    assert "m4" in members()
    serves(again, cluster.urls)
