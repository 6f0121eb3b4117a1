"""Both drivers over real sockets: the same calls, results and errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

import agentmem_client as client


@contextlib.contextmanager
def silent_node() -> Iterator[str]:
    """A URL where connections are taken, and nothing is ever answered: as under SIGSTOP."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


class FromAsync:
    """Drives an AsyncClient as if it blocked, so that each test is written once."""

    def __init__(self, urls: Any, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.runner.get_loop()
        self.client = client.AsyncClient(urls, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if inspect.isasyncgen(made):

                async def collect() -> list[Any]:
                    return [item async for item in made]

                return self.runner.run(collect())
            return self.runner.run(made)

        return call

    def end(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(params=["blocking", "asyncio"])
def memory(request: pytest.FixtureRequest, fake: Any) -> Iterator[Any]:
    policy = client.Policy(deadline_s=5.0, backoff_s_max=0.2)
    if request.param == "blocking":
        with client.Client(fake.urls["n1"], policy=policy) as made:
            yield made
    else:
        driven = FromAsync(fake.urls["n1"], policy=policy)
        yield driven
        driven.end()


def test_a_memory_lives_its_whole_life(memory: Any) -> None:
    added = memory.add("Ana likes tea", user_id="ana", metadata={"city": "Oslo"})
    (stored,) = added.memories
    assert memory.get(stored.id).metadata == {"city": "Oslo"}
    changed = memory.update(stored.id, "Ana likes coffee", expected_version=1)
    assert (changed.version, changed.content) == (2, "Ana likes coffee")
    with pytest.raises(client.Conflict):
        memory.update(stored.id, "too late", expected_version=1)
    assert [hit.id for hit in memory.search("coffee", user_id="ana")] == [stored.id]
    assert memory.history(stored.id)[0].event == "ADD"
    memory.delete(stored.id)
    with pytest.raises(client.NotFound):
        memory.get(stored.id)
    with pytest.raises(client.NotFound):
        memory.delete(stored.id)


def test_requests_reach_the_leader_of_their_shard_without_a_hop(memory: Any, fake: Any) -> None:
    for i in range(12):
        memory.add("tea", user_id=f"user-{i}")
    wanted = [fake.leaders[fake.shard_of(f"user:user-{i}")] for i in range(12)]
    assert fake.asked("/memories") == wanted


def test_many_are_stored_in_batches_in_order_and_progress_is_told(memory: Any, fake: Any) -> None:
    items = [{"content": f"fact {i}", "user_id": f"user-{i % 7}"} for i in range(95)]
    steps: list[int] = []
    added = memory.add_many(items, batch_size=40, progress=lambda done, _part: steps.append(done))
    assert steps == [40, 80, 95]
    assert [m.content for m in added.memories] == [item["content"] for item in items]
    assert set(fake.asked("/batch")) == set(fake.leaders.values())


def test_a_bad_item_is_refused_alone(memory: Any) -> None:
    added = memory.add_many([{"content": "good"}, {"content": ""}], user_id="ana")
    assert [item.ok for item in added] == [True, False]
    ((at, error),) = added.errors
    assert at == 1 and isinstance(error, client.InvalidField)
    with pytest.raises(client.InvalidField):
        memory.add("", user_id="ana")


def test_a_batch_that_fails_midway_says_what_was_stored(memory: Any, fake: Any) -> None:
    batches = 0

    def refuse(_node: str, request: web.Request) -> web.Response | None:
        nonlocal batches
        batches += request.path.endswith("/batch")
        full = {"code": "disk_full", "detail": "The disk is full."}
        return web.json_response(full, status=503) if batches > 1 else None

    fake.refuse = refuse
    items = [{"content": str(i)} for i in range(6)]
    with pytest.raises(client.DiskFull) as caught:
        memory.add_many(items, user_id="ana", batch_size=3)
    assert [m.content for m in caught.value.stored.memories] == ["0", "1", "2"]


def test_a_list_follows_its_cursor_to_the_end(memory: Any) -> None:
    memory.add_many([{"content": str(i)} for i in range(10)], user_id="ana")
    assert sorted(int(m.content) for m in memory.list(user_id="ana")) == list(range(10))
    page = memory.list_page(user_id="ana")
    assert len(page) == 3 and page.next_cursor


def test_many_searches_are_answered_in_their_order(memory: Any) -> None:
    memory.add_many([{"content": f"word{i}", "user_id": f"user-{i}"} for i in range(60)])
    searches = [{"query": f"word{i}", "user_id": f"user-{i}"} for i in range(60)]
    answers = memory.search_many(searches)
    assert [[hit.content for hit in answer] for answer in answers] == [
        [f"word{i}"] for i in range(60)
    ]


def test_many_are_deleted_and_a_missing_one_is_named(memory: Any) -> None:
    ids = [
        m.id for m in memory.add_many([{"content": "a"}, {"content": "b"}], user_id="a").memories
    ]
    deleted = memory.delete_many([ids[0], "00000000-0000-8000-8000-000000000000", ids[1]])
    assert [item.ok for item in deleted] == [True, False, True]
    assert isinstance(deleted.results[1].error, client.NotFound)


def test_a_write_whose_answer_was_lost_takes_effect_once(memory: Any, fake: Any) -> None:
    memory.cluster()
    lost = 0

    def refuse(_node: str, request: web.Request) -> web.Response | None:
        nonlocal lost
        if request.method == "POST" and lost:
            return None
        if request.method == "POST" and request.headers["Idempotency-Key"] not in fake.ledger:
            lost += 1
            # It happened, but the answer never arrives: the connection breaks.
            item = fake.store({"content": "once", "user_id": "ana"})
            fake.ledger[request.headers["Idempotency-Key"]] = {"results": [item], "token": "s00:1"}
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return None

    fake.refuse = refuse
    memory.add("once", user_id="ana")
    assert lost == 1
    assert [m["content"] for m in fake.memories.values()] == ["once"]


def test_a_leader_that_moved_is_found_again(memory: Any, fake: Any) -> None:
    memory.add("tea", user_id="ana")
    shard = fake.shard_of("user:ana")
    old = fake.leaders[shard]
    new = next(node for node in ("n1", "n2", "n3") if node != old)

    def refuse(node: str, request: web.Request) -> web.Response | None:
        if request.path.endswith("/memories") and node != fake.leaders[shard]:
            body = {"code": "not_leader", "detail": "Not I.", "details": {"leader": new}}
            return web.json_response(body, status=503)
        return None

    fake.leaders[shard] = new
    fake.refuse = refuse
    memory.add("more tea", user_id="ana")
    assert fake.asked("/memories")[-2:] == [old, new]


def test_a_dead_first_node_is_no_obstacle_when_another_is_named(fake: Any) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{held.getsockname()[1]}"  # bound but not listening: refused
        with client.Client(f"{dead},{fake.urls['n2']}") as memory:
            assert memory.add("tea", user_id="ana").memories


def test_nobody_there_is_said_soon_and_plainly() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        started = time.monotonic()
        policy = client.Policy(unreachable_s_max=0.3)
        refused = pytest.raises(client.ConnectionFailed, match="Connection refused")
        with client.Client(url, policy=policy) as memory, refused:
            memory.add("tea", user_id="ana")
        assert time.monotonic() - started < 2.0


def test_https_to_a_node_that_speaks_http_is_said_to_be_that(fake: Any) -> None:
    url = fake.urls["n1"].replace("http:", "https:")
    policy = client.Policy(unreachable_s_max=0.3)
    refused = pytest.raises(client.ConnectionFailed, match="does not speak TLS")
    with client.Client(url, policy=policy) as memory, refused:
        memory.add("tea", user_id="ana")


def test_a_silent_node_costs_no_more_than_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)  # connections succeed, answers never come
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with client.Client(url) as memory, pytest.raises(client.DeadlineExceeded):
            memory.get("x", deadline_s=0.8)
        assert time.monotonic() - started < 2.0


def test_a_stopped_node_is_left_after_a_moment_and_later_calls_do_not_wait(
    memory: Any, fake: Any
) -> None:
    added = memory.add("tea", user_id="ana").memories[0]
    shard = fake.shard_of("user:ana")
    stopped = fake.leaders[shard]
    with silent_node() as url:
        # The map says that the leader is where connections are taken and nothing is answered.
        fake.urls[stopped] = url
        memory.cluster()
        took: list[float] = []
        for _ in range(12):
            begun = time.monotonic()
            assert memory.get(added.id).content == "tea"
            took.append(time.monotonic() - begun)
        writing = time.monotonic()
        memory.update(added.id, "more tea")
        took_to_write_s = time.monotonic() - writing
    assert client.Policy().hedge_s_first <= took[0] < 1.5
    assert max(took[1:]) < client.Policy().hedge_s_first
    assert took_to_write_s < client.Policy().hedge_write_s_first


def test_a_write_to_a_stopped_node_is_done_once_by_another(memory: Any, fake: Any) -> None:
    stopped = fake.leaders[fake.shard_of("user:ana")]
    with silent_node() as url:
        fake.urls[stopped] = url
        memory.cluster()
        begun = time.monotonic()
        assert len(memory.add("tea", user_id="ana").memories) == 1
        assert client.Policy().hedge_write_s_first <= time.monotonic() - begun < 2.0
    assert [m["content"] for m in fake.memories.values()] == ["tea"]


def test_a_stopped_node_does_not_hold_the_places_of_requests_to_others(fake: Any) -> None:
    async def story() -> float:
        async with client.AsyncClient(fake.urls["n1"], in_flight_max=2) as memory:
            added = (await memory.add("tea", user_id="ana")).memories[0]
            with silent_node() as url:
                fake.urls[fake.leaders[fake.shard_of("user:ana")]] = url
                await memory.cluster()
                begun = time.monotonic()
                await asyncio.gather(*(memory.get(added.id) for _ in range(20)))
                return time.monotonic() - begun

    assert asyncio.run(story()) < 1.5


def test_an_address_in_the_map_that_is_no_url_costs_only_its_own_node(
    memory: Any, fake: Any
) -> None:
    fake.urls[fake.leaders[fake.shard_of("user:ana")]] = "http://127.0.0.1:999999"
    memory.cluster()
    assert memory.add("tea", user_id="ana").memories


def test_health_is_of_the_node_that_was_asked(memory: Any, fake: Any) -> None:
    assert memory.health().is_ready
    assert not memory.health(fake.urls["n2"]).is_ready


def test_the_key_is_sent_with_every_request(fake: Any) -> None:
    with client.Client(fake.urls["n1"], api_key="am_secret") as memory:
        memory.add("tea", user_id="ana")
    assert {headers["Authorization"] for *_, headers in fake.seen} == {"Bearer am_secret"}


def test_an_answer_beyond_the_limit_is_not_read_into_memory(fake: Any) -> None:
    policy = client.Policy(answer_bytes_max=10)
    too_much = pytest.raises(client.ProtocolError, match="more than 10 bytes")
    with client.Client(fake.urls["n1"], policy=policy) as memory, too_much:
        memory.cluster()


def test_a_closed_client_says_so_and_leaves_no_thread(fake: Any) -> None:
    memory = client.Client(fake.urls["n1"])
    memory.add("tea", user_id="ana")
    memory.close()
    memory.close()
    assert not [t for t in threading.enumerate() if t.name == "agentmem-client"]
    with pytest.raises(client.ClientClosed):
        memory.add("tea", user_id="ana")


def test_a_forgotten_client_ends_quietly_with_the_program(fake: Any) -> None:
    program = (
        "from agentmem_client import Client\n"
        f"memory = Client({fake.urls['n1']!r})\n"
        "memory.add('tea', user_id='ana')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_forgotten_client_gives_its_thread_back(fake: Any) -> None:
    memory = client.Client(fake.urls["n1"])
    memory.add("tea", user_id="ana")
    del memory
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "agentmem-client"]


def test_threads_may_share_a_blocking_client(fake: Any) -> None:
    with client.Client(fake.urls["n1"]) as memory:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(5):
                    memory.add(f"{number}-{i}", user_id=f"user-{number}")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert failures == []
        assert len(fake.memories) == 40


def test_a_url_that_is_none_is_refused() -> None:
    for url in ("", " , ", []):
        with pytest.raises(ValueError, match="URL"):
            client.Client(url)
    policy = client.Policy(deadline_s=0.5)
    with client.Client("not a url", policy=policy) as memory, pytest.raises(client.AgentMemError):
        memory.get("x")


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(kind).items()
            if not name.startswith("_") and callable(method)
        }

    asynchronous = surface(client.AsyncClient)
    del asynchronous["run_batch"]  # internal
    assert asynchronous == surface(client.Client)


def test_a_cancelled_task_leaves_the_client_usable(fake: Any) -> None:
    async def story() -> None:
        async with client.AsyncClient(fake.urls["n1"]) as memory:
            task = asyncio.create_task(memory.add("tea", user_id="ana"))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert (await memory.add("more", user_id="ana")).memories

    asyncio.run(story())
