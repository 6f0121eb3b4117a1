"""Size, time and number of requests are bounded, and what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from agentmem_cluster.errors import NotLeader

Run = Callable[..., None]
MEMORIES = "/api/v1/memories"
HEAD = b"POST /api/v1/memories HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def places_taken(node: Any) -> tuple[int, int]:
    admission = node.server._api.admission
    return admission.total, admission.body_bytes


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def test_an_announced_body_over_the_limit_is_refused_before_it_is_read(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.raw(HEAD + b"Content-Length: 5000000000\r\n\r\n", whole=False)
        assert status_of(answer) == 413
        error = body_of(answer)
        assert "limits.body_bytes_max" in error["detail"]
        assert b"Connection: close" in answer
        assert places_taken(node) == (0, 0)

    run(scenario, limits__body_bytes_max=1024)


def test_a_chunked_body_over_the_limit_is_refused_while_it_is_read(run: Run) -> None:
    async def scenario(node: Any) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(2_000):
                sent += 65_536
                yield b" " * 65_536

        url = f"http://{node.address}{MEMORIES}"
        try:
            async with node.session.post(url, data=endless()) as answer:
                assert (answer.status, (await answer.json())["code"]) == (413, "too_large")
        except OSError:
            pass  # the node closed while we were still sending: as good an answer
        assert sent < 20_000_000
        await until(lambda: places_taken(node) == (0, 0))
        assert node.service.calls == []

    run(scenario, limits__body_bytes_max=100_000)


def test_chunked_bodies_are_taken(run: Run) -> None:
    async def scenario(node: Any) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b'{"content": "a', b'b", "user', b'_id": "u"}'):
                yield piece
                await asyncio.sleep(0.01)

        async with node.session.post(f"http://{node.address}{MEMORIES}", data=pieces()) as answer:
            assert answer.status == 201
        assert node.service.seen[-1][0].content == "ab"

    run(scenario)


def test_a_body_of_megabytes_is_taken(run: Run) -> None:
    async def scenario(node: Any) -> None:
        text = "tea " * 1_000_000
        assert (await node.post("/memories", {"content": text, "user_id": "u"})).status == 201
        assert node.service.seen[-1][0].content == text
        assert places_taken(node) == (0, 0)

    run(scenario)


def test_a_client_that_expects_it_is_told_to_continue(run: Run) -> None:
    async def scenario(node: Any) -> None:
        host, _, port = node.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"content": "a", "user_id": "u"}'
        writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert await reader.readline() == b"\r\n"
        writer.write(body)
        assert b" 201 " in await reader.readline()
        writer.close()

    run(scenario)


def test_a_body_that_does_not_come_is_given_up(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.raw(HEAD + b'Content-Length: 100\r\n\r\n{"cont', whole=False)
        assert status_of(answer) == 400
        assert "limits.body_read_ms_max" in body_of(answer)["detail"]
        assert places_taken(node) == (0, 0)

    run(scenario, limits__body_read_ms_max=50)


def test_a_body_that_is_cut_off_leaves_no_place_taken(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(node: Any) -> None:
        host, _, port = node.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(HEAD + b'Content-Length: 100\r\n\r\n{"cont')
        await until(lambda: places_taken(node)[0] == 1)
        writer.close()
        await until(lambda: places_taken(node) == (0, 0))
        assert node.service.calls == []

    run(scenario)
    assert caplog.records == []  # clients come and go


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nhelloXX\r\n", b"-1\r\n"])
def test_a_body_that_breaks_its_framing_is_400(
    run: Run, rest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(node: Any) -> None:
        host, _, port = node.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        deadline = b"X-AgentMem-Deadline-Ms: 100\r\n"
        writer.write(HEAD + deadline + b'Transfer-Encoding: chunked\r\n\r\n6\r\n{"cont\r\n')
        await until(lambda: places_taken(node)[0] == 1)
        writer.write(rest)
        assert b" 400 " in await reader.readline()
        writer.close()
        await until(lambda: places_taken(node) == (0, 0))

    run(scenario)
    assert caplog.records == []


def test_headers_that_do_not_come_end_the_connection(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem_node.api.connections.KEEP_ALIVE_S", 0.2)

    async def scenario(node: Any) -> None:
        assert await node.raw(b"GET /health/live HTTP/1.1\r\nHost: 127.") == b""
        assert await node.raw(b"") == b""
        assert node.server._connections.open == 0

    run(scenario)


def test_an_answer_that_is_never_read_is_given_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem_node.api.reply._UNSENT_S_MAX", 0.2)

    async def scenario(node: Any) -> None:
        await node.add("x" * 10_000_000)
        host, _, port = node.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(b"GET /api/v1/memories HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        before = node.server._connections.open
        await until(lambda: node.server._connections.open == before - 1 and before > 1)
        writer.close()

    run(scenario)


def test_all_bodies_together_are_bounded(run: Run) -> None:
    async def scenario(node: Any) -> None:
        go_on = asyncio.Event()

        async def wait(name: str) -> None:
            await go_on.wait()

        node.service.before = wait
        body = {"content": "x" * 900, "user_id": "u"}
        first = asyncio.create_task(node.ask("POST", MEMORIES, body))
        await until(lambda: len(node.service.calls) == 1)
        refused = await node.ask("POST", MEMORIES, body)
        assert (refused.status, refused.json["code"]) == (429, "overloaded")
        assert "limits.bodies_bytes_max" in refused.json["detail"]
        assert refused.headers["Retry-After"] == "1"
        go_on.set()
        assert (await first).status == 201
        assert (await node.ask("POST", MEMORIES, body)).status == 201
        assert places_taken(node) == (0, 0)

    run(scenario, limits__body_bytes_max=1024, limits__bodies_bytes_max=1500)


def test_too_many_of_one_kind_are_429_and_leave_room_for_others(run: Run) -> None:
    async def scenario(node: Any) -> None:
        go_on = asyncio.Event()

        async def wait(name: str) -> None:
            if name == "search":
                await go_on.wait()

        node.service.before = wait
        searches = [
            asyncio.create_task(node.post("/memories/search", {"query": "a"})) for _ in range(12)
        ]
        await until(lambda: sum(task.done() for task in searches) == 6)
        refused = [task.result() for task in searches if task.done()]
        assert {answer.status for answer in refused} == {429}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert (await node.post("/memories", {"content": "a", "user_id": "u"})).status == 201
        assert (await node.ask("GET", "/health/ready")).status == 200
        go_on.set()
        answers = await asyncio.gather(*searches)
        assert sum(answer.status == 200 for answer in answers) == 6
        metrics = (await node.ask("GET", "/metrics")).body.decode()
        assert "agentmem_http_requests_refused_total 6.0" in metrics

    run(scenario, limits__requests_in_flight_max=8)


def test_no_request_outlives_its_deadline(run: Run) -> None:
    async def scenario(node: Any) -> None:
        async def hang(name: str) -> None:
            await asyncio.Event().wait()

        node.service.before = hang
        clock = asyncio.get_running_loop().time
        started = clock()
        answers = await asyncio.gather(
            node.post("/memories/search", {"query": "a"}, X_AgentMem_Deadline_Ms="50"),
            node.post("/memories", {"content": "a", "user_id": "u"}),
            node.post("/memories/search/batch", {"searches": [{"query": "a"}] * 20}),
            node.get("/memories", X_AgentMem_Deadline_Ms="999999999"),
        )
        assert clock() - started < 2
        for answer in answers:
            assert (answer.status, answer.json["code"]) == (504, "deadline_exceeded")
        assert places_taken(node) == (0, 0)
        node.service.before = None
        assert (await node.get("/memories")).status == 200

    run(scenario, limits__deadline_ms_default=100, limits__deadline_ms_max=200)


def test_the_callers_deadline_is_on_the_services_clock(run: Run) -> None:
    async def scenario(node: Any) -> None:
        import time

        for text, seconds in (("1500", 1.5), ("999999", 60.0)):
            await node.get("/memories", X_AgentMem_Deadline_Ms=text)
            left = node.service.calls[-1][1].deadline - time.monotonic()
            assert seconds - 0.5 < left <= seconds
        await node.get("/memories")
        assert 9.5 < node.service.calls[-1][1].deadline - time.monotonic() <= 10

    run(scenario)


def test_connections_over_the_limit_are_told_so_and_closed(run: Run) -> None:
    async def scenario(node: Any) -> None:
        host, _, port = node.address.rpartition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await until(lambda: node.server._connections.open == 3)
        answer = await node.raw(b"")
        assert status_of(answer) == 503
        assert "limits.connections_max" in body_of(answer)["detail"]
        held[0][1].close()
        await until(lambda: node.server._connections.open == 2)
        assert (await node.ask("GET", "/health/live")).status == 200
        for _, writer in held:
            writer.close()

    run(scenario, limits__connections_max=3)


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    async def scenario(node: Any) -> None:
        asked = [b"a", b"b", b"c"] * 5
        requests = b"".join(
            b"GET /api/v1/memories/%s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % name for name in asked
        )
        last = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        answer = await node.raw(requests + last)
        found = [line[-4:-2] for line in answer.split(b"There is no memory ")[1:]]
        assert answer.count(b"HTTP/1.1 404") == 15
        assert answer.count(b"HTTP/1.1 200") == 1
        assert len(found) >= 15

    run(scenario)


def test_http_1_0_is_answered_and_closed_unless_it_asks_otherwise(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.raw(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert status_of(answer) == 200
        assert body_of(answer) == {"status": "ok"}
        keep = b"GET /health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        both = await node.raw(keep + b"GET /health/live HTTP/1.0\r\n\r\n")
        assert both.count(b"HTTP/1.1 200 OK") == 2
        assert both.count(b"Connection: keep-alive") == 1

    run(scenario)


def test_a_stopping_node_answers_503_and_finishes_what_it_has(run: Run) -> None:
    async def scenario(node: Any) -> None:
        go_on = asyncio.Event()

        async def wait(name: str) -> None:
            await go_on.wait()

        node.service.before = wait
        slow = asyncio.create_task(node.post("/memories", {"content": "a", "user_id": "u"}))
        await until(lambda: len(node.service.calls) == 1)
        node.server.begin_shutdown()
        refused = await node.post("/memories/search", {"query": "a"})
        assert (refused.status, refused.json["code"]) == (503, "shutting_down")
        assert refused.headers["Retry-After"] == "1"
        assert (await node.ask("GET", "/health/live")).status == 200
        ready = await node.ask("GET", "/health/ready")
        assert (ready.status, ready.json["status"]) == (503, "shutting_down")
        stopping = asyncio.create_task(node.server.stop(grace_s=5))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        go_on.set()
        assert (await slow).status == 201
        await asyncio.wait_for(stopping, 2)
        with pytest.raises(OSError):
            await node.ask("GET", "/health/live")

    run(scenario)


def test_a_stopping_node_cancels_what_does_not_end(run: Run) -> None:
    async def scenario(node: Any) -> None:
        async def hang(name: str) -> None:
            await asyncio.Event().wait()

        node.service.before = hang
        slow = asyncio.create_task(node.post("/memories/search", {"query": "a"}))
        await until(lambda: len(node.service.calls) == 1)
        await asyncio.wait_for(node.server.stop(grace_s=0.05), 3)
        assert (await slow).status == 504

    run(scenario)


def test_a_hint_below_a_second_says_retry_at_once(run: Run) -> None:
    async def scenario(node: Any) -> None:
        async def refuse(name: str) -> None:
            raise NotLeader("n2 leads s01.", leader="n2")

        node.service.before = refuse
        answer = await node.get("/memories")
        assert (answer.status, answer.json["code"]) == (503, "not_leader")
        assert answer.headers["Retry-After"] == "0"
        assert answer.json["details"] == {"leader": "n2"}

    run(scenario)


def test_a_slow_reader_does_not_stop_others(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await node.add("x" * 500_000)
        host, _, port = node.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        one = b"GET /api/v1/memories HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        writer.write(one * 50)
        await until(lambda: len(node.service.calls) > 2)
        for _ in range(20):
            assert (await node.ask("GET", "/health/live")).status == 200
        # Its own requests wait for it to read: answers do not pile up in memory.
        assert len(node.service.calls) < 30
        writer.transport.abort()
        assert reader is not None

    run(scenario)
