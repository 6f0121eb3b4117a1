"""The link between nodes: who may connect, what is delivered, and what happens when a peer goes."""

from __future__ import annotations

import asyncio
import ssl
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import uvloop

from agentmem_cluster.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    InternalError,
    NotLeader,
    Overloaded,
    Unavailable,
    WrongShard,
)
from agentmem_cluster.link.ca import create_ca, issue
from agentmem_cluster.link.link import Link, LinkLimits
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.realtime import RealClock

QUICK = LinkLimits(
    frame_bytes_max=1 << 20,
    buffer_bytes_max=1 << 20,
    calls_max=8,
    greeting_s_max=1.0,
    silence_s_max=0.6,
    ping_s=0.15,
    reconnect_s_max=0.2,
)


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Both loops: they differ in how they close, and in what they tell of TLS."""
    loop: Run = request.param
    return loop


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    create_ca(folder, "north")
    for node in ("n1", "n2", "n3"):
        issue(folder, node)
    return folder


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another authority, which calls its cluster the same and its nodes too."""
    folder = tmp_path_factory.mktemp("strangers")
    create_ca(folder, "north")
    issue(folder, "n1")
    return folder


def make(
    folder: Path, node: str, cluster_id: str = "c1", limits: LinkLimits = QUICK, level: int = 1
) -> Link:
    tls = LinkTls.load_folder(folder, "north", node)
    listen, clock = ("127.0.0.1", 0), RealClock()
    return Link(node, listen, {}, tls, clock, cluster_id=cluster_id, limits=limits, level=level)


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


async def connect(*links: Link) -> None:
    """Start links and tell them of each other."""
    for link in links:
        await link.start()
    peers = {link.node_id: f"127.0.0.1:{link.port}" for link in links}
    for link in links:
        link.set_peers(peers)


@asynccontextmanager
async def pair(folder: Path, limits: LinkLimits = QUICK) -> AsyncIterator[tuple[Link, Link]]:
    a, b = make(folder, "n1", limits=limits), make(folder, "n2", limits=limits)
    try:
        await connect(a, b)
        await until(lambda: a.is_up("n2") and b.is_up("n1"))
        yield a, b
    finally:
        await a.close()
        await b.close()


# -- frames and calls -----------------------------------------------------------------------


def test_frames_arrive_whole_in_order_and_together(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            got: list[Any] = []
            batches: list[str] = []

            def on_raft(peer: str, frames: list[Any]) -> None:
                batches.append(peer)
                got.extend(frames)

            b.on_raft = on_raft
            sent = [[i, b"x" * (i % 700), "text", None, {"k": [1.5]}] for i in range(500)]
            for i in range(0, 500, 5):
                assert a.send_raft("n2", sent[i : i + 5])
            await until(lambda: len(got) == 500)
            assert got == sent
            assert set(batches) == {"n1"}
            assert len(batches) < 100, "frames of one turn are delivered together"

    run(story())


def test_a_call_is_answered_both_ways(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):

            async def echo(peer: str, body: dict[str, Any]) -> Any:
                return [peer, body]

            a.register("echo", echo)
            b.register("echo", echo)
            body = {"bytes": b"\xff\x00", "text": "é", "list": [1, None, 2.5]}
            assert await a.call("n2", "echo", body, timeout=5) == ["n1", body]
            assert await b.call("n1", "echo", body, timeout=5) == ["n2", body]

    run(story())


@pytest.mark.parametrize(
    "error",
    [
        NotLeader("no", leader="n3", hint="ask n3"),
        NotLeader("no"),
        WrongShard("moved", map_version=7),
        Conflict("lost the race", version=3, items=[1, "a"]),
        Overloaded("busy"),
        DeadlineExceeded("late"),
        BadRequest("wrong", message_of_other="x"),
    ],
)
def test_an_error_of_the_peer_is_raised_here_as_it_was(run: Run, folder: Path, error: Any) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):

            async def fail(_peer: str, _body: dict[str, Any]) -> Any:
                error.retry_after_s = 2.5
                raise error

            b.register("fail", fail)
            with pytest.raises(type(error)) as raised:
                await a.call("n2", "fail", {}, timeout=5)
            assert type(raised.value) is type(error)
            assert raised.value.as_dict() == error.as_dict()
            assert raised.value.retry_after_s == 2.5
            if isinstance(error, NotLeader):
                assert raised.value.leader == error.leader

    run(story())


def test_a_bug_in_a_handler_is_an_internal_error_without_its_text(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):

            async def fail(_peer: str, _body: dict[str, Any]) -> Any:
                raise ZeroDivisionError("secret")

            async def unsendable(_peer: str, _body: dict[str, Any]) -> Any:
                return object()

            b.register("fail", fail)
            b.register("unsendable", unsendable)
            for method in ("fail", "unsendable"):
                with pytest.raises(InternalError) as raised:
                    await a.call("n2", method, {}, timeout=5)
                assert "secret" not in raised.value.message
            with pytest.raises(BadRequest, match="knows no call"):
                await a.call("n2", "unknown", {}, timeout=5)
            with pytest.raises(InternalError, match="cannot be sent"):
                await a.call("n2", "fail", {"x": b"x" * (2 << 20)}, timeout=5)
            assert a.is_up("n2")

    run(story())


def test_a_call_past_its_deadline_raises_and_is_cancelled_at_the_peer(
    run: Run, folder: Path
) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            cancelled = asyncio.Event()

            async def hang(_peer: str, _body: dict[str, Any]) -> Any:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancelled.set()
                    raise

            b.register("hang", hang)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await a.call("n2", "hang", {}, timeout=0.2)
            assert time.monotonic() - began < 1
            await asyncio.wait_for(cancelled.wait(), 2)

    run(story())


def test_a_caller_that_gives_up_stops_the_work_at_the_peer(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            begun, cancelled = asyncio.Event(), asyncio.Event()

            async def hang(_peer: str, _body: dict[str, Any]) -> Any:
                begun.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancelled.set()
                    raise

            b.register("hang", hang)
            call = asyncio.create_task(a.call("n2", "hang", {}, timeout=30))
            await asyncio.wait_for(begun.wait(), 2)
            call.cancel()
            await asyncio.wait_for(cancelled.wait(), 2)

    run(story())


def test_more_calls_than_the_cap_are_refused_and_the_rest_answered(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            release = asyncio.Event()

            async def wait(_peer: str, _body: dict[str, Any]) -> Any:
                await release.wait()
                return "done"

            b.register("wait", wait)
            calls = [asyncio.create_task(a.call("n2", "wait", {}, timeout=5)) for _ in range(12)]
            await until(lambda: sum(call.done() for call in calls) == 4)
            release.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert results.count("done") == 8
            assert sum(isinstance(result, Overloaded) for result in results) == 4

    run(story())


def test_calls_fail_at_once_when_the_peer_goes(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            begun = asyncio.Event()

            async def hang(_peer: str, _body: dict[str, Any]) -> Any:
                begun.set()
                await asyncio.sleep(60)

            b.register("hang", hang)
            call = asyncio.create_task(a.call("n2", "hang", {}, timeout=30))
            await asyncio.wait_for(begun.wait(), 2)
            await b.close()
            with pytest.raises(Unavailable, match="lost"):
                await asyncio.wait_for(call, 2)
            with pytest.raises(Unavailable, match="not connected"):
                await a.call("n2", "hang", {}, timeout=30)
            assert not a.send_raft("n2", [[1]])

    run(story())


# -- up and down -----------------------------------------------------------------------------


def test_sessions_grow_and_both_sides_agree_on_them(run: Run, folder: Path) -> None:
    async def story() -> None:
        a, b = make(folder, "n1"), make(folder, "n2")
        at_a: list[int] = []
        at_b: list[int] = []
        order: list[str] = []

        def up(_peer: str, session: int) -> None:
            at_a.append(session)
            order.append("up")

        a.on_up = up
        a.on_down = lambda _peer: order.append("down")
        b.on_up = lambda _peer, session: at_b.append(session)
        await connect(a, b)
        for turn in range(1, 4):
            await until(lambda n=turn: len(at_a) == n and len(at_b) == n)
            a._up["n2"][0].abort("the test cuts it")
            await until(lambda n=turn: order.count("down") == n)
        await a.close()
        await b.close()
        assert at_a[:3] == at_b[:3] == sorted(set(at_a[:3]))
        assert order == ["up", "down"] * (len(order) // 2)

    run(story())


def test_a_restarted_peer_is_found_again_at_a_higher_session(run: Run, folder: Path) -> None:
    async def story() -> None:
        a, b = make(folder, "n1"), make(folder, "n2")
        sessions: list[int] = []
        a.on_up = lambda _peer, session: sessions.append(session)
        await connect(a, b)
        await until(lambda: sessions)
        for _ in range(2):
            await b.close()
            b = make(folder, "n2")
            count = len(sessions)
            await b.start()
            b.set_peers({"n1": f"127.0.0.1:{a.port}"})
            a.set_peers({"n2": f"127.0.0.1:{b.port}"})  # a pod that moved has a new address
            await until(lambda n=count: len(sessions) > n)
        assert sessions == sorted(set(sessions))
        await a.close()
        await b.close()

    run(story())


def test_a_peer_that_dials_again_replaces_its_half_open_connection(run: Run, folder: Path) -> None:
    """A machine lost power and is back before anybody noticed."""

    async def story() -> None:
        patient = LinkLimits(silence_s_max=60, ping_s=20)
        b = make(folder, "n2", limits=patient)
        told: list[Any] = []
        b.on_up = lambda peer, session: told.append(("up", session))
        b.on_down = lambda peer: told.append("down")
        await b.start()
        b.set_peers({"n1": "127.0.0.1:1"})
        lost, back = make(folder, "n1", limits=patient), make(folder, "n1", limits=patient)
        await lost.start()
        lost.set_peers({"n2": f"127.0.0.1:{b.port}"})
        await until(lambda: told == [("up", 1)])
        hanging = asyncio.create_task(b.call("n1", "never", {}, timeout=30))
        lost.register("never", lambda _peer, _body: asyncio.sleep(60))
        await back.start()
        back.set_peers({"n2": f"127.0.0.1:{b.port}"})
        await until(lambda: told[:3] == [("up", 1), "down", ("up", 2)])
        with pytest.raises((Unavailable, BadRequest)):
            await asyncio.wait_for(hanging, 2)
        for link in (lost, back, b):
            await link.close()

    run(story())


def test_a_peer_that_falls_silent_is_noticed(run: Run, folder: Path) -> None:
    """A cut cable: TCP says nothing. A relay stands in for it, and stops relaying."""

    async def story() -> None:
        a, b = make(folder, "n1"), make(folder, "n2")
        cut = asyncio.Event()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other = await asyncio.open_connection("127.0.0.1", b.port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    if not cut.is_set():
                        sink.write(data)

            await asyncio.gather(pump(reader, other[1]), pump(other[0], writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        await a.start()
        await b.start()
        a.set_peers({"n2": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"})
        b.set_peers({"n1": "127.0.0.1:1"})
        await until(lambda: a.is_up("n2") and b.is_up("n1"))
        await asyncio.sleep(2 * QUICK.silence_s_max)
        assert a.is_up("n2"), "an idle connection is kept up"
        cut.set()
        began = time.monotonic()
        await until(lambda: not a.is_up("n2") and not b.is_up("n1"))
        assert time.monotonic() - began < 2 * QUICK.silence_s_max + 0.5
        await a.close()
        await b.close()
        server.close()

    run(story())


def test_a_peer_that_does_not_read_costs_bounded_memory(run: Run, folder: Path) -> None:
    async def story() -> None:
        limits = LinkLimits(buffer_bytes_max=1 << 20, silence_s_max=30, ping_s=10)
        async with pair(folder, limits) as (a, b):
            b._up["n1"][0]._transport.pause_reading()  # type: ignore[union-attr]
            frame = [b"x" * 100_000]
            accepted = 0
            while a.send_raft("n2", frame):
                accepted += 1
                assert accepted < 2_000, "it never said no"
                await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await a.call("n2", "any", {}, timeout=1)
            assert a.stats()[0].queued_bytes < 2 << 20

    run(story())


def test_a_removed_peer_is_disconnected_and_not_let_in_again(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            b.set_peers({})
            await until(lambda: not a.is_up("n2") and not b.is_up("n1"))
            await asyncio.sleep(0.3)
            assert not a.is_up("n2") and not b.peers_up()

    run(story())


def test_statistics_name_every_peer(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):
            a.send_raft("n2", [[b"x" * 1000]])
            await until(lambda: b.stats()[0].received_bytes > 1000)
            (stats,) = a.stats()
            assert (stats.name, stats.connected) == ("n2", True)
            assert stats.sent_bytes > 1000
            await b.close()
            await until(lambda: not a.is_up("n2"))
            (stats,) = a.stats()
            assert not stats.connected and stats.sent_bytes > 1000

    run(story())


# -- strangers --------------------------------------------------------------------------------


def test_keys_are_readable_by_their_owner_only(folder: Path) -> None:
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    before = (folder / "n1.key").read_bytes()
    create_ca(folder, "north")
    issue(folder, "n1")
    assert (folder / "n1.key").read_bytes() == before


def test_a_certificate_of_another_node_or_cluster_is_not_loaded(folder: Path) -> None:
    files = (folder / "ca.crt", folder / "n1.crt", folder / "n1.key")
    with pytest.raises(ValueError, match="not agentmem://north/n2"):
        LinkTls.load(*files, "north", "n2")
    with pytest.raises(ValueError, match="not agentmem://south/n1"):
        LinkTls.load(*files, "south", "n1")
    with pytest.raises(OSError, match=r"SSL|PEM|key"):
        LinkTls.load(folder / "ca.crt", folder / "n1.crt", folder / "n2.key", "north", "n1")
    tls = LinkTls.load(*files, "north", "n1")
    assert tls.server.minimum_version is ssl.TLSVersion.TLSv1_3
    with pytest.raises(ValueError, match="names n1"):
        Link("n2", ("127.0.0.1", 0), {}, tls, RealClock(), cluster_id="c1")


def test_nodes_of_another_cluster_stay_apart(run: Run, folder: Path) -> None:
    async def story() -> None:
        a, b = make(folder, "n1", cluster_id="c1"), make(folder, "n2", cluster_id="c2")
        await connect(a, b)
        await asyncio.sleep(0.5)
        assert not a.peers_up() and not b.peers_up()
        await a.close()
        await b.close()

    run(story())


def test_a_node_of_another_authority_is_refused(run: Run, folder: Path, strangers: Path) -> None:
    async def story() -> None:
        a, b = make(strangers, "n1"), make(folder, "n2")
        await connect(a, b)
        await asyncio.sleep(0.5)
        assert not a.peers_up() and not b.peers_up()
        await a.close()
        await b.close()

    run(story())


def test_the_node_that_answers_must_be_the_one_that_was_dialled(run: Run, folder: Path) -> None:
    async def story() -> None:
        a, c = make(folder, "n1"), make(folder, "n3")
        await a.start()
        await c.start()
        c.set_peers({"n1": "127.0.0.1:1"})
        a.set_peers({"n2": f"127.0.0.1:{c.port}"})
        await asyncio.sleep(0.4)
        assert not a.peers_up() and not c.peers_up()
        await a.close()
        await c.close()

    run(story())


def framed(value: Any) -> bytes:
    body = msgpack.packb(value)
    return struct.pack(">I", len(body)) + body


HELLO = framed([0, 1, "c1", "n1", 5])
HOSTILE = {
    "garbage instead of a greeting": b"\xc1\xff garbage",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "a huge length": b"\xff\xff\xff\xff",
    "a greeting over its cap": struct.pack(">I", 1 << 20) + b"x" * 10_000,
    "another protocol": framed([0, 2, "c1", "n1", 5]),
    "another cluster": framed([0, 1, "c9", "n1", 5]),
    "another node's name": framed([0, 1, "c1", "n3", 5]),
    "a session that is none": framed([0, 1, "c1", "n1", "x"]),
    "a session out of range": framed([0, 1, "c1", "n1", 1 << 63]),
    "no greeting": framed([1, [[1]]]),
    "a huge frame later": HELLO + struct.pack(">I", 1 << 31),
    "deep nesting": HELLO + struct.pack(">I", 100_000) + b"\x91" * 100_000,
    "an array that claims more than there is": HELLO
    + struct.pack(">I", 5)
    + b"\xdd\xff\xff\xff\xff",
    "a broken string": HELLO + struct.pack(">I", 3) + b"\xa2\xff\xfe",
    "an extension type": HELLO + struct.pack(">I", 3) + b"\xd4\x05\x00",
    "trailing bytes in a frame": HELLO + struct.pack(">I", 2) + b"\xc0\xc0",
    "an unhashable key": HELLO + struct.pack(">I", 3) + b"\x81\x90\xc0",
    "a frame that is no list": HELLO + framed({"a": 1}),
    "an empty frame": HELLO + struct.pack(">I", 0),
    "an unknown kind": HELLO + framed([99, 1]),
    "a kind that cannot be one": HELLO + framed([{}, 1]),
    "Raft that is no list": HELLO + framed([1, "x"]),
    "a call without a body": HELLO + framed([2, 1, "m"]),
    "a call with a wrong body": HELLO + framed([2, 1, "m", [], 100]),
    "a call with a wrong time": HELLO + framed([2, 1, "m", {}, -5]),
    "a reply to nothing in a wrong shape": HELLO + framed([3, "x", None]),
    "an error of a wrong shape": HELLO + framed([4, 1]),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_bytes_cost_the_connection_and_nothing_else(
    run: Run, folder: Path, name: str
) -> None:
    async def story() -> None:
        b = make(folder, "n2")
        await b.start()
        b.set_peers({"n1": "127.0.0.1:1"})
        tls = LinkTls.load_folder(folder, "north", "n1")
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", b.port, ssl=tls.client, server_hostname=""
        )
        writer.write(HOSTILE[name])
        try:
            async with asyncio.timeout(5):
                while await reader.read(65536):
                    pass
        except (ConnectionError, ssl.SSLError):
            pass
        await until(lambda: not b.peers_up())
        writer.transport.abort()
        # The node is as it was: the real peer connects.
        a = make(folder, "n1")
        await a.start()
        a.set_peers({"n2": f"127.0.0.1:{b.port}"})
        await until(lambda: a.is_up("n2") and b.is_up("n1"))
        await a.close()
        await b.close()

    run(story())


def test_a_stranger_without_tls_or_certificate_gets_nothing(run: Run, folder: Path) -> None:
    async def story() -> None:
        b = make(folder, "n2")
        await b.start()
        b.set_peers({"n1": "127.0.0.1:1"})
        plain = await asyncio.open_connection("127.0.0.1", b.port)
        plain[1].write(HELLO)
        anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anonymous.check_hostname = False
        anonymous.verify_mode = ssl.CERT_NONE
        bare = await asyncio.open_connection("127.0.0.1", b.port, ssl=anonymous)
        bare[1].write(HELLO)
        for reader, writer in (plain, bare):
            try:
                async with asyncio.timeout(5):
                    got = await reader.read(65536)
            except (ConnectionError, ssl.SSLError):
                got = b""
            assert b"c1" not in got
            writer.transport.abort()
        old = LinkTls.load_folder(folder, "north", "n1").client
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", b.port, ssl=old, server_hostname="")
        silent = await asyncio.open_connection("127.0.0.1", b.port)  # never even shakes hands
        async with asyncio.timeout(5):
            assert await silent[0].read(100) == b""
        silent[1].transport.abort()
        assert not b.peers_up()
        await b.close()

    run(story())


def test_a_bug_that_frames_trigger_costs_the_connection_only(run: Run, folder: Path) -> None:
    async def story() -> None:
        async with pair(folder) as (a, b):

            def broken(_peer: str, _frames: list[Any]) -> None:
                raise RuntimeError("a bug")

            b.on_raft = broken
            a.send_raft("n2", [[1]])
            await until(lambda: not a.is_up("n2"))
            b.on_raft = lambda _peer, _frames: None
            await until(lambda: a.is_up("n2"))

    run(story())


# -- versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", ["n1", "n2"], ids=["who dials", "who is dialled"])
def test_a_peer_of_a_lower_level_is_refused_once_it_would_go_wrong(
    run: Run, folder: Path, strict: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "agentmem.link")

    async def story() -> None:
        levels = {"n1": 1, "n2": 1, "n3": 2, strict: 2}
        links = {name: make(folder, name, level=level) for name, level in levels.items()}
        demanding = links[strict]
        (older,) = {"n1", "n2"} - {strict}
        try:
            await connect(*links.values())
            await until(lambda: demanding.peers_up() == sorted({older, "n3"}))
            demanding.require_level(2)
            await until(lambda: demanding.peers_up() == ["n3"])
            await until(lambda: "it runs an older version (level 1)" in caplog.text)
            assert demanding.peers_up() == ["n3"]
            assert links["n3"].is_up(older)  # nobody has told it to be strict
        finally:
            for link in links.values():
                await link.close()

    run(story())
