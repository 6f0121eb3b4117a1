"""The proxy, as `toxiproxy-python` and real sockets see it."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
from toxiproxy import Toxiproxy
from toxiproxy.exceptions import InvalidToxic, NotFound, ProxyExists

DEADLINE_S = 10.0


class Echo:
    """Sends back what it gets; `received` is what came, `ended` whether the sender closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = bytearray()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            while data := connection.recv(65_536):
                self.received += data
                connection.sendall(data)

    def close(self) -> None:
        # A blocked accept() does not return when its socket is closed by another thread.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(toxiproxy: Toxiproxy, echo: Echo) -> Any:
    return toxiproxy.create(upstream=echo.address, name="echo")


def connect(proxy: Any) -> socket.socket:
    host, _, port = proxy.listen.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """What comes back for `data`; less of it when the connection ends before."""
    connection.sendall(data)
    answer = bytearray()
    while len(answer) < len(data):
        part = connection.recv(65_536)
        if not part:
            break
        answer += part
    return bytes(answer)


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_without_toxics_bytes_pass_unchanged(proxy: Any) -> None:
    data = bytes(range(256)) * 4_000
    with connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        answer = bytearray()
        while len(answer) < len(data):
            part = connection.recv(65_536)
            assert part
            answer += part
        sender.join(DEADLINE_S)
    assert bytes(answer) == data


def test_the_end_of_a_stream_passes_while_the_other_direction_goes_on(proxy: Any) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while part := connection.recv(65_536):
            answer += part
        assert answer == b"last words"


def test_latency_delays_a_byte_but_not_the_rate(proxy: Any) -> None:
    proxy.add_toxic(type="latency", attributes={"latency": 300})
    with connect(proxy) as connection:
        begun = time.monotonic()
        for _ in range(20):
            connection.sendall(b"x" * 1_000)
        left = 20_000
        while left:
            left -= len(connection.recv(65_536))
        took_s = time.monotonic() - begun
    assert 0.3 <= took_s < 2.0, "twenty packets are under way at once"


def test_removing_latency_lets_what_waits_go_at_once(proxy: Any) -> None:
    proxy.add_toxic(type="latency", attributes={"latency": 60_000})
    with connect(proxy) as connection:
        connection.sendall(b"hello")
        proxy.destroy_toxic("latency_downstream")
        assert connection.recv(10) == b"hello"


def test_bandwidth_limits_the_rate(proxy: Any) -> None:
    proxy.add_toxic(type="bandwidth", attributes={"rate": 100})
    with connect(proxy) as connection:
        begun = time.monotonic()
        assert len(exchange(connection, b"x" * 51_200)) == 51_200
        assert 0.45 <= time.monotonic() - begun < 3.0


def test_a_cut_after_send_delivers_the_request_and_loses_the_answer(proxy: Any, echo: Echo) -> None:
    proxy.add_toxic(type="limit_data", stream="downstream", attributes={"bytes": 0})
    with connect(proxy) as connection:
        assert exchange(connection, b"a write") == b""
    assert bytes(echo.received) == b"a write"


def test_limit_data_lets_so_many_bytes_pass_and_closes(proxy: Any) -> None:
    proxy.add_toxic(type="limit_data", attributes={"bytes": 5})
    with connect(proxy) as connection:
        assert exchange(connection, b"0123456789") == b"01234"


def test_a_black_hole_swallows_one_direction_and_closes_when_it_goes(
    proxy: Any, echo: Echo
) -> None:
    with connect(proxy) as connection:
        assert exchange(connection, b"before") == b"before"
        proxy.add_toxic(type="timeout", stream="downstream", attributes={"timeout": 0})
        connection.sendall(b"lost answer")
        wait_for(lambda: bytes(echo.received) == b"beforelost answer", "upstream goes on")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        connection.settimeout(DEADLINE_S)
        proxy.destroy_toxic("timeout_downstream")
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    with connect(proxy) as again:
        assert exchange(again, b"healed") == b"healed"


def test_timeout_closes_after_its_time(proxy: Any) -> None:
    proxy.add_toxic(type="timeout", attributes={"timeout": 200})
    with connect(proxy) as connection:
        begun = time.monotonic()
        with suppress(ConnectionResetError):
            assert exchange(connection, b"hello") == b""
        assert 0.1 <= time.monotonic() - begun < 3.0


def test_reset_peer_is_a_real_reset(proxy: Any) -> None:
    with connect(proxy) as connection:
        assert exchange(connection, b"hello") == b"hello"
        proxy.add_toxic(type="reset_peer", attributes={"timeout": 0})
        with pytest.raises(ConnectionResetError):
            connection.recv(100)


def test_slicer_makes_small_packets_of_the_same_bytes(proxy: Any) -> None:
    attributes = {"average_size": 10, "size_variation": 5, "delay": 1_000}
    proxy.add_toxic(type="slicer", attributes=attributes)
    with connect(proxy) as connection:
        connection.sendall(b"x" * 100)
        sizes = []
        while sum(sizes) < 100:
            sizes.append(len(connection.recv(65_536)))
    assert len(sizes) > 3


def test_slow_close_delays_the_end_only(proxy: Any) -> None:
    proxy.add_toxic(type="slow_close", attributes={"delay": 400})
    with connect(proxy) as connection:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        begun = time.monotonic()
        assert connection.recv(100) == b"hello"
        assert connection.recv(100) == b""
        assert time.monotonic() - begun >= 0.3


def test_a_disabled_proxy_drops_connections_and_refuses_new_ones(proxy: Any) -> None:
    with connect(proxy) as connection:
        assert exchange(connection, b"hello") == b"hello"
        with proxy.down():
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
    with connect(proxy) as again:
        assert exchange(again, b"back") == b"back"


def test_toxicity_zero_befalls_nobody(proxy: Any) -> None:
    proxy.add_toxic(type="limit_data", toxicity=0.0, attributes={"bytes": 0})
    with connect(proxy) as connection:
        assert exchange(connection, b"hello") == b"hello"


def test_an_unreachable_upstream_ends_the_connection(toxiproxy: Toxiproxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    proxy = toxiproxy.create(upstream=f"127.0.0.1:{port}", name="nobody")
    with connect(proxy) as connection, suppress(ConnectionResetError):
        assert connection.recv(100) == b""


# -- the HTTP API ---------------------------------------------------------------------------


def test_the_client_sees_what_it_made(toxiproxy: Toxiproxy, echo: Echo) -> None:
    assert json.loads(toxiproxy.version()) == {"version": "2.9.0"}
    made = toxiproxy.create(upstream=echo.address, name="one", enabled=False)
    assert made.enabled is False
    made.enable()
    made.add_toxic(type="latency", name="slow", attributes={"latency": 5})
    shown = toxiproxy.get_proxy("one")
    assert shown.enabled and shown.upstream == echo.address and shown.listen != "127.0.0.1:0"
    toxic = shown.toxics()["slow"]
    assert (toxic.type, toxic.stream, toxic.toxicity) == ("latency", "downstream", 1.0)
    assert toxic.attributes == {"latency": 5, "jitter": 0}
    made.destroy()
    assert toxiproxy.get_proxy("one") is None


def test_reset_enables_all_and_removes_toxics(toxiproxy: Toxiproxy, proxy: Any) -> None:
    proxy.add_toxic(type="latency", attributes={"latency": 5})
    proxy.disable()
    assert toxiproxy.reset()
    assert proxy.toxics() == {}
    assert toxiproxy.get_proxy("echo").enabled


def test_populate_makes_what_is_missing(toxiproxy: Toxiproxy, echo: Echo) -> None:
    listed = [{"name": n, "upstream": echo.address, "listen": "127.0.0.1:0"} for n in ("a", "b")]
    assert [proxy.name for proxy in toxiproxy.populate(listed)] == ["a", "b"]
    assert set(toxiproxy.proxies()) == {"a", "b"}


def test_errors_have_toxiproxys_statuses_and_texts(toxiproxy: Toxiproxy, proxy: Any) -> None:
    with pytest.raises(ProxyExists):
        toxiproxy.create(upstream="127.0.0.1:1", name="echo")
    with pytest.raises(InvalidToxic, match="invalid toxic type"):
        proxy.add_toxic(type="poison")
    with pytest.raises(InvalidToxic, match="stream was invalid"):
        proxy.add_toxic(type="latency", stream="sideways")
    with pytest.raises(NotFound, match="toxic not found"):
        proxy.destroy_toxic("nothing")
    proxy.add_toxic(type="latency")
    with pytest.raises(ProxyExists, match="toxic already exists"):
        proxy.add_toxic(type="latency")
    proxy.destroy()
    with pytest.raises(NotFound, match="proxy not found"):
        proxy.toxics()


def call(
    address: tuple[str, int], method: str, path: str, document: object = None
) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://{address[0]}:{address[1]}{path}",
        data=None if document is None else json.dumps(document).encode(),
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_what_the_client_cannot_say_is_answered_too(
    proxy_address: tuple[str, int], proxy: Any, echo: Echo
) -> None:
    status, made = call(proxy_address, "POST", "/proxies", {"name": "x", "upstream": echo.address})
    assert (status, made["enabled"], made["toxics"]) == (201, True, [])
    same = [{k: made[k] for k in ("name", "listen", "upstream")}]
    status, shown = call(proxy_address, "POST", "/populate", same)
    assert (status, shown) == (201, {"proxies": [made]})
    assert call(proxy_address, "POST", "/proxies", {"upstream": "x"}) == (
        400,
        {"error": "missing required field: name", "status": 400},
    )
    status, body = call(proxy_address, "POST", "/proxies", "text")
    assert (status, body["status"]) == (400, 400)
    toxics = "/proxies/echo/toxics"
    status, toxic = call(proxy_address, "POST", toxics, {"type": "latency", "name": "slow"})
    assert (status, toxic["toxicity"]) == (200, 1.0)
    status, toxic = call(
        proxy_address, "PATCH", toxics + "/slow", {"attributes": {"latency": 7}, "toxicity": 0.5}
    )
    assert (status, toxic["attributes"]) == (200, {"latency": 7, "jitter": 0})
    assert call(proxy_address, "GET", toxics + "/slow") == (200, toxic)
    status, body = call(proxy_address, "PATCH", toxics + "/slow", {"attributes": {"latency": "x"}})
    assert status == 400
