"""D5, D7, D8, D14, D15, D16: errors, callbacks, the wire, latency, names and stalls."""

from __future__ import annotations

import asyncio
import pickle
import random
import socket
import ssl
import struct
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.dns_resolver import DnsCachingResolver

from agentmem_chaos.sim.disk import SimDisk
from agentmem_cluster.errors import DeadlineExceeded, DiskFull, NotLeader, Overloaded
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.link.ca import create_ca, issue
from agentmem_cluster.link.link import Link
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.raft.api import Applied, GroupSpec
from agentmem_cluster.raft.frames import Kind
from agentmem_cluster.raft.host import Host
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.realtime import RealClock, RealRng

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


def test_d05_ours_an_error_is_a_result_and_a_failing_callback_applies_nothing_twice(
    ours: Any,
) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    a = cluster["A"]

    def fails(outcome: Any) -> None:
        raise RuntimeError("the waiter is gone")

    wrong = a.propose(b"wrong")
    a.core.propose("g", b"once", fails)
    after = a.propose(b"after it")
    cluster.settle(rounds=20)
    assert isinstance(wrong[0].result, ValueError)
    assert isinstance(after[0], Applied)
    for name in "ABC":
        assert cluster[name].machine.commands == [b"wrong", b"once", b"after it"]
        assert cluster[name].core.fatal is None
    assert a.core.counters["callbacks_failed"] == 1


def test_d05_ours_a_state_machine_that_fails_stops_its_node_and_only_that(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")

    def broken(entries: Any) -> Any:
        raise OSError("the local disk is gone")

    cluster["B"].machine.apply = broken
    outcome = cluster["A"].propose(b"on")
    cluster.settle(rounds=20)
    assert isinstance(cluster["B"].core.fatal, OSError)
    assert isinstance(outcome[0], Applied)
    assert cluster["C"].machine.commands == [b"on"]


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


def test_d07_ours_a_follower_forwards_nothing_and_says_who_leads(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    (outcome,) = cluster["B"].propose(b"to the leader, please")
    assert isinstance(outcome, NotLeader) and outcome.leader == "A"


def test_d07_ours_not_done_is_said_only_of_what_is_not_done(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    cluster.queues.clear()
    reaches_c, reaches_nobody = cluster["A"].propose(b"reaches C"), None
    cluster["A"].tick()
    cluster.deliver("A", "C")
    cluster["C"].tick()
    cluster.cut_off("A")
    reaches_nobody = cluster["A"].propose(b"reaches nobody")
    cluster["A"].tick()
    cluster.elect("C", live="BC")
    for _ in range(40):
        cluster["A"].clock.now_s += 0.1
        cluster["A"].tick()
    assert not cluster["A"].is_leader
    assert reaches_c == reaches_nobody == [], "neither is known; the caller's deadline decides"

    cluster["C"].propose(b"later")
    cluster.settle("BC")
    cluster.cuts = set()
    cluster.connect("A")
    cluster.settle(rounds=60, advance_s=0.05)
    assert cluster["A"].machine.commands == [b"reaches C", b"later"]
    assert isinstance(reaches_c[0], Applied)
    assert isinstance(reaches_nobody[0], NotLeader)


def test_d07_ours_a_proposal_without_a_quorum_is_answered_at_its_deadline() -> None:
    async def scenario() -> None:
        clock = RealClock()
        journal = Journal.open(SimDisk(random.Random(1)))
        host = Host("A", journal, None, clock, RealRng(), RaftSettings(), on_fatal=print)
        await host.start()
        try:
            group = host.add_group(GroupSpec("g", 1, ("A",)), StuckMachine())
            await group.wait_applied(0, deadline=clock.monotonic() + 5)
            while not group.is_leader:
                await asyncio.sleep(0.01)
            begun_s = clock.monotonic()
            with pytest.raises(DeadlineExceeded):
                await group.propose(b"never applied", deadline=begun_s + 0.2)
            assert clock.monotonic() - begun_s < 1.0
        finally:
            await host.stop(transfer=False)

    asyncio.run(asyncio.wait_for(scenario(), 10))


class StuckMachine:
    """Its disk is full for ever, so nothing that is proposed is ever applied."""

    applied_index = durable_index = 0

    def apply(self, entries: Any) -> list[Any]:
        raise DiskFull("no room")

    def checkpoint(self) -> None: ...
    def checkpoint_done(self, job: Any) -> None: ...

    def digest(self) -> bytes:
        return b""

    def close(self) -> None: ...


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


def test_d08_ours_hears_nobody_without_a_certificate_of_the_cluster(tmp_path: Path) -> None:
    create_ca(tmp_path / "ours", "tests")
    create_ca(tmp_path / "theirs", "tests")
    for folder, node in (("ours", "A"), ("theirs", "B")):
        issue(tmp_path / folder, node)
    pickled = pickle.dumps(MakesFolder(tmp_path / "entered"))

    async def scenario() -> None:
        tls = LinkTls.load_folder(tmp_path / "ours", "tests", "A")
        link = Link("A", ("127.0.0.1", 0), {"B": "127.0.0.1:1"}, tls, RealClock(), cluster_id="c")
        heard: list[Any] = []
        link.on_raft = lambda peer, frames: heard.append(frames)
        link.on_up = lambda peer, session: heard.append(peer)
        await link.start()
        try:
            for context in (None, stranger_of(tmp_path / "theirs")):
                assert await is_refused(link.port, context, pickled)
            assert heard == []
        finally:
            await link.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert not (tmp_path / "entered").exists()


def stranger_of(folder: Path) -> ssl.SSLContext:
    """Holds a certificate for a member's name, signed by somebody else."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(folder / "B.crt", folder / "B.key")
    return context


async def is_refused(port: int, context: ssl.SSLContext | None, data: bytes) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(struct.pack("i", len(data)) + data)
        answer = await asyncio.wait_for(reader.read(1 << 16), 10)
        writer.close()
    except OSError:
        return True  # reset, or refused in the handshake
    # An unencrypted talker may be told, in a TLS alert, that it is not understood.
    return len(answer) < 64


@pytest.mark.parametrize(
    "frames",
    [
        [b"not a list"],
        [[]],
        [[99, "g", 1, b"boot", 1]],
        [[1, "g", 1, b"boot", 2**64 - 1, 0, 0, 0, 0, [], []]],
        [[1, "g", 1, b"boot", 1, -1, 0, 0, 0, [], []]],
        [[1, "g", 1, b"boot", 1, 0, 0, 0, 0, [[1, 2]], [b"only one"]]],
        [{"type": "append_entries"}, None, 7, "x", [[[[]]]]],
    ],
)
def test_d08_ours_drops_and_counts_what_is_no_frame(ours: Any, frames: list[Any]) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    before = cluster["B"].status
    cluster["B"].core.receive("A", frames)
    cluster["B"].tick()
    assert cluster["B"].core.fatal is None
    assert cluster["B"].status == before
    counters = cluster["B"].core.counters
    assert counters["frames_malformed"] + counters["frames_strange"] == len(frames)


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


def test_d14_ours_a_single_command_waits_for_nothing_but_the_network_and_the_disk(
    ours: Any,
) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    clock_s = cluster["A"].clock.now_s
    outcome = cluster["A"].propose(b"quick")
    cluster["A"].tick()
    cluster.deliver("A", "B")
    cluster["B"].tick()
    cluster.deliver("B", "A")
    cluster["A"].tick()
    assert isinstance(outcome[0], Applied)
    assert cluster["A"].clock.now_s == clock_s, "no time had to pass"


def test_d14_ours_commands_of_one_turn_share_one_append_and_one_sync(ours: Any) -> None:
    cluster = ours("ABC")
    cluster.elect("A")
    cluster.settle()
    cluster.queues.clear()
    syncs = cluster["A"].disk.syncs
    for number in range(100):
        cluster["A"].propose(b"%d" % number)
    cluster["A"].tick()
    appends = [frame for frame in cluster.queues["A", "B"] if frame[0] == Kind.APPEND]
    assert [len(frame[-1]) for frame in appends] == [100]
    assert cluster["A"].disk.syncs == syncs + 1


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


def test_d15_ours_looks_a_peer_up_again_for_every_dial_and_never_on_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_ca(tmp_path, "tests")
    for node in "AB":
        issue(tmp_path, node)
    asked: list[tuple[str, bool]] = []
    port_of_b = free_port()

    def look_up(host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if host != "node-b.test":
            return real_look_up(host, port, *rest, **options)
        asked.append((host, threading.current_thread() is threading.main_thread()))
        # The pod has moved by the time of the third question.
        address = "127.0.0.1" if len(asked) >= 3 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port_of_b))]

    real_look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def scenario() -> None:
        def link(node: str, port: int, peers: dict[str, str]) -> Link:
            tls = LinkTls.load_folder(tmp_path, "tests", node)
            return Link(node, ("127.0.0.1", port), peers, tls, RealClock(), cluster_id="c")

        a = link("A", 0, {"B": f"node-b.test:{port_of_b}"})
        b = link("B", port_of_b, {"A": "127.0.0.1:1"})
        await b.start()
        await a.start()
        try:
            while not a.is_up("B"):
                await asyncio.sleep(0.02)
        finally:
            await a.close()
            await b.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert len(asked) >= 3
    assert not any(on_loop for _, on_loop in asked)


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


def test_d16_ours_refuses_what_it_does_not_queue_and_runs_what_it_does(ours: Any) -> None:
    cluster = ours("ABC", queue_commands_max=100)
    cluster.elect("A")
    outcomes = [cluster["A"].propose(b"%d" % number) for number in range(150)]
    refused = [outcome for outcome in outcomes if outcome]
    assert len(refused) == 50
    assert all(isinstance(outcome[0], Overloaded) for outcome in refused)
    cluster.settle(rounds=20)
    assert cluster["B"].machine.commands == [b"%d" % number for number in range(100)]
    assert sum(isinstance(outcome[0], Applied) for outcome in outcomes) == 100


def test_d16_ours_a_backlog_does_not_keep_heartbeats_waiting(ours: Any) -> None:
    cluster = ours("ABC", apply_entries_max=100)
    cluster.elect("A")
    a = cluster["A"]
    for number in range(5_000):
        a.propose(b"%d" % number)
    cluster.settle(rounds=3)
    applied = a.machine.apply
    batches: list[int] = []

    def apply(entries: Any) -> Any:
        batches.append(len(entries))
        return applied(entries)

    a.machine.apply = apply
    cluster.settle(rounds=20)
    assert max(batches, default=0) <= 100, "between two batches it hears and speaks"
    assert len(a.machine.commands) == 5_000
