"""Relays pass bytes on, a cut one passes none, and a healed one lets both ends dial anew."""

from __future__ import annotations

import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator

import pytest

from agentmem_node.console.wires import Wires, who_dials

WAIT_S = 10.0
SILENCE_S = 0.3


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65_536):
            self.request.sendall(data)


@pytest.fixture
def echo() -> Iterator[str]:
    """HOST:PORT of somebody who says everything again."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(WAIT_S)


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires(lambda: {"n1": os.getpid()})
    yield made
    made.close()
    made.close()  # a second time does nothing


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def echoes(connection: socket.socket, data: bytes) -> bool:
    connection.settimeout(WAIT_S)
    connection.sendall(data)
    got = b""
    while len(got) < len(data):
        got += connection.recv(65_536)
    return got == data


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_S)
    connection.sendall(b"anybody?")
    try:
        return connection.recv(100) == b"never"
    except TimeoutError:
        return True


def is_reset(connection: socket.socket) -> bool:
    connection.settimeout(WAIT_S)
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


def test_everything_passes_and_a_pair_has_one_address(wires: Wires, echo: str) -> None:
    address = wires.address("n1", "n2", echo)
    assert wires.address("n1", "n2", echo) == address != wires.address("n3", "n2", echo)
    with dial(address) as connection:
        assert echoes(connection, os.urandom(1_000_000))


def test_a_cut_node_hears_nothing_and_is_not_told_until_it_is_healed(
    wires: Wires, echo: str
) -> None:
    address = wires.address("n1", "n2", echo)
    with dial(address) as before, dial(wires.address("n1", "n3", echo)) as other:
        assert echoes(before, b"hello")
        wires.cut("n2")
        assert wires.cut_nodes == {"n2"}
        assert is_silent(before)
        with dial(address) as during:  # accepted, as by a network that loses everything after
            assert is_silent(during)
            assert echoes(other, b"not concerned")
            wires.heal("n2")
            assert is_reset(during)
        assert is_reset(before)
        with dial(address) as after:
            assert echoes(after, b"again")


def test_a_link_between_two_cut_nodes_is_healed_by_the_second(wires: Wires, echo: str) -> None:
    wires.cut("n1")
    wires.cut("n2")
    address = wires.address("n1", "n2", echo)
    wires.heal("n2")
    with dial(address) as connection:
        assert is_silent(connection)
        wires.heal("n1")
        assert is_reset(connection)
    with dial(address) as connection:
        assert echoes(connection, b"both")


def test_who_is_not_there_is_a_closed_connection(wires: Wires) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = wires.address("n1", "n2", f"127.0.0.1:{unused.getsockname()[1]}")
        with dial(address) as connection:
            assert is_reset(connection)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whose a socket is")
def test_a_node_that_joined_later_is_cut_off_from_whoever_dials(wires: Wires, echo: str) -> None:
    front = wires.address(None, "n4", echo)
    with dial(front) as connection:
        assert echoes(connection, b"hello")
        assert who_dials(connection.getsockname()[1], {"n1": os.getpid()}) == "n1"
        assert wires.strangers() == 0
        wires.cut("n1")
        assert is_silent(connection)


def test_a_stranger_is_nobody(echo: str) -> None:
    wires = Wires(dict)
    try:
        with dial(wires.address(None, "n4", echo)) as connection:
            assert echoes(connection, b"hello")
            assert wires.strangers() == 1
    finally:
        wires.close()
