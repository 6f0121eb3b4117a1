"""D5, D7, D8, D14, D15, D16: errors, callbacks, the wire, latency, names and stalls."""

from __future__ import annotations

import pickle
import socket
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.dns_resolver import DnsCachingResolver

# -- D5: exceptions --


def test_d05_released_an_error_in_a_command_stops_every_replica_for_ever(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    cluster["A"].fail()
    cluster["A"].put("after it")
    for _ in range(20):
        for name in "ABC":
            cluster["A"]._SyncObj__newAppendEntriesTime = 0
            with_errors(cluster[name].doTick)
        for sender, receiver in list(cluster.queues):
            cluster.deliver(sender, receiver)
    assert cluster["A"].executions > 5, "and while it fails, no heartbeat leaves"
    assert all(cluster[name].applied == [] for name in "ABC")


def test_d05_released_an_error_in_a_callback_applies_the_command_again_on_that_replica(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")

    def fails(result: Any, error: int) -> None:
        raise RuntimeError("the waiter is gone")

    cluster["A"].put("once", callback=fails)
    for _ in range(8):
        for name in "ABC":
            cluster["A"]._SyncObj__newAppendEntriesTime = 0
            with_errors(cluster[name].doTick)
        for sender, receiver in list(cluster.queues):
            cluster.deliver(sender, receiver)
    assert [len(cluster[name].applied) for name in "ABC"] == [2, 1, 1]


def with_errors(tick: Any) -> None:
    try:
        tick()
    except (KeyError, RuntimeError):
        pass  # what a ticking thread of the released library logs before it goes on


# -- D7: callbacks --


def test_d07_released_a_forwarded_command_that_is_lost_is_never_answered(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    answers: list[int] = []
    cluster.cuts = {("B", "A")}
    cluster["B"].put("lost", callback=lambda result, error: answers.append(error))
    cluster["B"].doTick()
    cluster.cuts = set()
    for _ in range(300):
        cluster.round(advance_s=0.1)
    assert answers == []


def test_d07_released_says_leader_changed_of_a_command_that_is_applied(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC", appendEntriesUseBatch=False)
    cluster.elect("A")
    cluster.queues.clear()
    answers: list[int] = []
    cluster["B"].put("applied", callback=lambda result, error: answers.append(error))
    cluster["B"].doTick()
    cluster.deliver("B", "A")
    cluster["A"]._checkCommandsToApply()
    cluster.queues["A", "B"].clear()  # the answer is lost with A; the entry reaches C
    cluster.deliver("A", "C")
    cluster.queues.clear()
    cluster.elect("C", live="BC", rounds=30)
    assert answers == [FAIL_REASON.LEADER_CHANGED]
    assert cluster["C"].applied == ["applied"]


# -- D8: the wire --


class MakesFolder:
    """A pickle that does something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_d08_released_runs_code_of_whoever_reaches_its_port(tmp_path: Path) -> None:
    port = free_port()
    node = SyncObj(f"127.0.0.1:{port}", ["127.0.0.1:1"], SyncObjConf(autoTick=False))
    try:
        data = zlib.compress(pickle.dumps(MakesFolder(tmp_path / "entered")))
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(struct.pack("i", len(data)) + data)
            for _ in range(50):
                node.doTick(0.01)
                if (tmp_path / "entered").exists():
                    break
        assert (tmp_path / "entered").exists()
        server = node._SyncObj__transport._server
        assert server._TcpServer__host == "0.0.0.0", "and it listens everywhere by default"
    finally:
        node.destroy()


# -- D14: latency --


def test_d14_released_a_single_command_waits_for_the_next_period(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC")
    cluster.elect("A")
    for _ in range(3):
        tick_all(cluster)
    cluster["A"]._SyncObj__newAppendEntriesTime = cluster.clock.now_s + 0.1  # one was just sent
    answers: list[int] = []
    cluster["A"].put("quick", callback=lambda result, error: answers.append(error))
    begun_s = cluster.clock.now_s
    while not answers:
        cluster.clock.now_s += 0.001
        tick_all(cluster)
        assert cluster.clock.now_s - begun_s < 2.0
    assert cluster.clock.now_s - begun_s >= 0.09


def test_d14_released_without_batches_sends_once_for_every_command(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC", appendEntriesUseBatch=False)
    cluster.elect("A")
    cluster.queues.clear()
    for number in range(100):
        cluster["A"].put(number)
    cluster["A"].doTick()
    assert len(cluster.queues["A", "B"]) >= 100


def tick_all(cluster: Any) -> None:
    for name in cluster.names:
        cluster[name].doTick()
    for sender, receiver in list(cluster.queues):
        cluster.deliver(sender, receiver)


# -- D15: names --


def test_d15_released_keeps_a_peers_old_address_for_ten_minutes_and_blocks_to_find_it(
    released: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = ["10.0.0.1"], []

    def look_up(host: str, port: Any) -> list[Any]:
        asked.append(host)  # called, and waited for, inside the tick
        return [(socket.AF_INET, 0, 0, "", (address[0], 0))]

    clock_s = [1_000.0]
    monkeypatch.setattr("pysyncobj.dns_resolver.monotonicTime", lambda: clock_s[0])
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    resolver = DnsCachingResolver(SyncObjConf().dnsCacheTime, SyncObjConf().dnsFailCacheTime)
    assert resolver.resolve("node-2") == "10.0.0.1"
    address[0] = "10.0.0.2"  # the pod moved
    clock_s[0] += 599.0
    assert resolver.resolve("node-2") == "10.0.0.1"
    assert asked == ["node-2"]


# -- D16: stalls --


def test_d16_released_raises_to_the_caller_of_a_command_that_it_runs_all_the_same(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("ABC", appendEntriesUseBatch=False, commandsQueueSize=200_000)
    cluster.elect("A")
    raised_at = None
    for number in range(90_000):
        try:
            cluster["A"]._applyCommand(b"\x01", None)
        except BlockingIOError:
            raised_at = number
            break
    assert raised_at is not None
    queued = cluster["A"]._SyncObj__commandsQueue._FastQueue__queue
    assert len(queued) == raised_at + 1


def test_d16_released_takes_commands_for_a_tenth_of_a_second_while_heartbeats_wait(
    released: SimpleNamespace,
) -> None:
    cluster = released.cluster("A")
    cluster.elect("A")
    for _ in range(20_000):
        cluster["A"]._applyCommand(b"\x01", None)
    a = cluster["A"]
    add = a._SyncObj__raftLog.add

    def add_slowly(*entry: Any) -> None:
        cluster.clock.now_s += 0.001  # a journal that takes its millisecond
        add(*entry)

    a._SyncObj__raftLog.add = add_slowly
    begun_s = cluster.clock.now_s
    a._checkCommandsToApply()
    assert cluster.clock.now_s - begun_s >= 0.1
