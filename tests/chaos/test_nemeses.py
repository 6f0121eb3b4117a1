"""What nemeses do to files and whom they cut off, without a cluster."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Hosts, Need, Pair
from agentmem_chaos.hosts.links import link_names, link_of
from agentmem_chaos.hosts.loopback import LoopbackHosts
from agentmem_chaos.hosts.netns import Network, missing_tools
from agentmem_chaos.nemeses.base import Field, Nemesis
from agentmem_chaos.nemeses.damage import flip_bits, has_content, truncate
from agentmem_chaos.nemeses.machine import fill
from agentmem_chaos.nemeses.network import (
    PartitionMajority,
    PartitionOne,
    PartitionOneWay,
    PartitionRing,
)
from agentmem_chaos.nemeses.registry import NEMESES


class Recorded:
    """Hosts that only remember what was cut: whom a nemesis chooses is decided without them."""

    def __init__(self, count: int) -> None:
        self.nodes = tuple(f"n{n}" for n in range(1, count + 1))
        self.lost: frozenset[Pair] = frozenset()

    async def cut(self, lost: frozenset[Pair]) -> None:
        self.lost = lost

    def hears(self, node: str) -> set[str]:
        others = set(self.nodes) - {node}
        return {other for other in others if (other, node) not in self.lost}


def struck(nemesis: Nemesis, count: int, seed: int = 1) -> Recorded:
    hosts = Recorded(count)
    field = Field(
        cast("Hosts", hosts), random.Random(seed), lambda: {"s00": "n2"}, lambda: {"s00": ()}
    )
    asyncio.run(nemesis.strike(field))
    return hosts


def undone(nemesis: Nemesis, hosts: Recorded) -> None:
    field = Field(cast("Hosts", hosts), random.Random(1), dict, dict)
    asyncio.run(nemesis.undo(field))


def test_a_leader_that_is_cut_off_hears_nobody_and_nobody_hears_it() -> None:
    nemesis = PartitionOne()
    hosts = struck(nemesis, 3)
    assert hosts.hears("n2") == set()
    assert hosts.hears("n1") == {"n3"}
    assert nemesis.sides == (frozenset({"n2"}), frozenset({"n1", "n3"}))
    undone(nemesis, hosts)
    assert hosts.lost == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_the_sides_of_a_split_are_whole_and_cannot_hear_each_other(seed: int) -> None:
    nemesis = PartitionMajority()
    hosts = struck(nemesis, 5, seed)
    assert nemesis.sides is not None
    small, large = nemesis.sides
    assert (len(small), len(large)) == (2, 3)
    for side in nemesis.sides:
        assert all(hosts.hears(node) == side - {node} for node in side)


@pytest.mark.parametrize("seed", range(5))
def test_in_a_ring_everybody_hears_two_and_of_three_one_is_a_bridge(seed: int) -> None:
    five = struck(PartitionRing(), 5, seed)
    for node in five.nodes:
        heard = five.hears(node)
        assert len(heard) == 2
        assert all(node in five.hears(other) for other in heard)
    three = struck(PartitionRing(), 3, seed)
    assert sorted(len(three.hears(node)) for node in three.nodes) == [1, 1, 2]


def test_a_one_way_cut_leaves_the_other_way_whole() -> None:
    for seed in range(5):
        hosts = struck(PartitionOneWay(), 3, seed)
        assert len(hosts.lost) == 2
        assert not any((b, a) in hosts.lost for a, b in hosts.lost)


def test_who_dials_decides_which_stream_carries_whose_bytes() -> None:
    assert link_of(("n1", "n2")) == ("link-n1-n2", "upstream")
    assert link_of(("n2", "n1")) == ("link-n1-n2", "downstream")
    assert link_names(("n1", "n2", "n3")) == ["link-n1-n2", "link-n1-n3", "link-n2-n3"]


# -- files ----------------------------------------------------------------------------------


def test_bits_flip_where_something_was_written_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "data"
    before = bytes(1_000) + b"written" * 20 + bytes(1_000)
    path.write_bytes(before)
    flip_bits(path, random.Random(1), 4)
    after = path.read_bytes()
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(changed) == 4
    for at in changed:
        assert before[at] != 0
        assert (before[at] ^ after[at]).bit_count() == 1


def test_a_file_is_cut_within_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for seed in range(20):
        path.write_bytes(b"w" * 500 + bytes(5_000))
        truncate(path, random.Random(seed))
        assert 0 < path.stat().st_size < 500


def test_an_empty_file_cannot_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100))
    assert not has_content(path)
    with pytest.raises(ChaosError, match="nothing that could be"):
        flip_bits(path, random.Random(1), 1)
    with pytest.raises(ChaosError, match="nothing that could be"):
        truncate(path, random.Random(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_fills_up_to_its_last_block(tmp_path: Path) -> None:
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, timeout=20)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        assert fill(tmp_path / "ballast") > 900_000
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "more").write_bytes(b"x" * 4_096)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True, timeout=20)


# -- hosts ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_namespaces_lose_what_is_cut_and_leave_nothing_behind() -> None:
    if missing_tools() is not None:
        pytest.skip(str(missing_tools()))

    def reaches(network: Network, sender: str, receiver: str) -> bool:
        """UDP, so that a lost answer does not look like a lost question."""
        enter = ["ip", "netns", "exec", network.namespace(receiver)]
        program = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.bind(('0.0.0.0', 9))\n"
            "print('bound', flush=True)\n"
            "sys.stdin.readline()\n"  # it was sent: what is to come is here
            "s.settimeout(0.5)\n"
            "try: print(s.recv(9).decode())\n"
            "except TimeoutError: print('nothing')\n"
        )
        listening = subprocess.Popen(
            [*enter, "python3", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert listening.stdout is not None
        try:
            assert listening.stdout.readline() == "bound\n"
            send = (
                "import socket\n"
                "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                f"s.sendto(b'hello', ('{network.address(receiver)}', 9))\n"
            )
            enter = ["ip", "netns", "exec", network.namespace(sender)]
            subprocess.run([*enter, "python3", "-c", send], check=True, timeout=20)
            return listening.communicate("sent\n", timeout=20)[0] == "hello\n"
        finally:
            listening.kill()
            listening.wait(10)

    async def story() -> list[Any]:
        network = Network(("n1", "n2"))
        try:
            await network.make()
        except ChaosError as error:
            await network.remove()
            pytest.skip(f"namespaces cannot be made here: {error}")
        try:
            # The very first packet may wait a second for the receiver's address to be resolved.
            seen = [any(reaches(network, "n1", "n2") for _ in range(10))]
            await network.cut(frozenset({("n1", "n2")}))
            seen += [reaches(network, "n1", "n2"), reaches(network, "n2", "n1")]
            network._cut = frozenset()  # as if the cut had been interrupted before it was noted
            await network.cut(frozenset())
            seen.append(reaches(network, "n1", "n2"))
        finally:
            await network.remove()
        links = subprocess.run(["ip", "link"], capture_output=True, text=True, timeout=20)
        spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, timeout=20)
        seen += [network.bridge in links.stdout, network.namespace("n1") in spaces.stdout]
        return seen

    assert asyncio.run(story()) == [True, False, True, True, False, False]


def test_hosts_say_what_is_missing_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = LoopbackHosts(tmp_path, 3)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    assert "apt install fiu-utils" in str(hosts.why_not(Need.FAILING_CALLS))
    assert "root" in str(hosts.why_not(Need.SMALL_DISK))
    assert hosts.why_not(Need.SIGNALS) is hosts.why_not(Need.PEER_PROXY) is None
    assert "apt install iptables" in str(missing_tools(("iptables",)))


def test_every_nemesis_describes_itself() -> None:
    for name, nemesis in NEMESES.items():
        assert nemesis.name == name
        assert len(nemesis.description) > 10
        low, high = nemesis.hold_s
        assert 0 <= low <= high


def test_flapping_ends_healed_whenever_it_is_undone() -> None:
    class Slow(Recorded):
        """Takes its time to cut, and forgets a cut that is interrupted, as a command does."""

        under_way = 0

        async def cut(self, lost: frozenset[Pair]) -> None:
            assert self.under_way == 0, "two cuts at once"
            self.under_way += 1
            await asyncio.sleep(0.01)
            self.lost = lost
            self.under_way -= 1

    async def story(after_s: float) -> Slow:
        hosts = Slow(3)
        field = Field(cast("Hosts", hosts), random.Random(1), dict, dict)
        nemesis = NEMESES["partition-flapping"]()
        await nemesis.strike(field)
        await asyncio.sleep(after_s)
        await asyncio.wait_for(nemesis.undo(field), 5.0)
        return hosts

    for after_s in (0.0, 0.005, 0.02):
        hosts = asyncio.run(story(after_s))
        assert hosts.lost == frozenset()
        assert hosts.under_way == 0
