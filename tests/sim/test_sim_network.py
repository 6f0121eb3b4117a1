"""The simulated network behaves as TCP does; virtual time and clocks do what they say."""

from __future__ import annotations

from typing import Any

from agentmem_chaos.sim.net import NetPlan, SimNet
from agentmem_chaos.sim.schedule import Schedule, SimClock, stream
from agentmem_chaos.sim.story import Story


class Recorder:
    """An endpoint that writes down what happens to it."""

    def __init__(self) -> None:
        self.alive = True
        self.paused = False
        self.frames: list[Any] = []
        self.sessions: list[tuple[str, int]] = []
        self.lost: list[str] = []

    def arrive(self, peer: str, frames: list[Any]) -> None:
        self.frames += frames

    def connected(self, peer: str, session: int) -> None:
        self.sessions.append((peer, session))

    def disconnected(self, peer: str) -> None:
        self.lost.append(peer)


class Pair:
    def __init__(self, seed: int = 1) -> None:
        self.schedule = Schedule()
        plan = NetPlan(
            delay_s=(0.001, 0.02),
            spike_chance=0.2,
            spike_s=0.5,
            break_after_s=(1.0, 2.0),
            reconnect_s=(0.1, 0.2),
        )
        story = Story(keep=False)
        self.net = SimNet(self.schedule, seed, plan, lambda name: 1, story.trace)
        self.ends = {"a": Recorder(), "b": Recorder()}
        for name, end in self.ends.items():
            self.net.attach(name, end)
        self.net.join("a")
        self.wait(1.0)

    def wait(self, seconds: float) -> None:
        self.schedule.run_until(self.schedule.now_s + seconds)


def test_frames_of_a_session_arrive_in_the_order_they_were_sent() -> None:
    pair = Pair()
    for number in range(200):
        assert pair.net.send("a", "b", [number])
    pair.wait(5.0)
    assert pair.ends["b"].frames == list(range(200))


def test_both_ends_learn_of_the_same_session() -> None:
    pair = Pair()
    assert pair.ends["a"].sessions == [("b", 1)]
    assert pair.ends["b"].sessions == [("a", 1)]


def test_a_broken_session_loses_what_was_in_flight_and_a_new_one_follows() -> None:
    pair = Pair()
    pair.net.send("a", "b", ["lost"])
    pair.net.break_session("a", "b")
    pair.wait(5.0)
    assert pair.ends["b"].frames == []
    assert pair.ends["a"].lost == ["b"]
    assert pair.ends["a"].sessions == [("b", 1), ("b", 2)]
    pair.net.send("a", "b", ["kept"])
    pair.wait(5.0)
    assert pair.ends["b"].frames == ["kept"]


def test_a_short_cut_delays_frames_and_loses_none() -> None:
    pair = Pair()
    pair.net.cut({("a", "b")})
    pair.net.send("a", "b", ["stalled"])
    pair.wait(0.5)
    assert pair.ends["b"].frames == []
    pair.net.heal()
    pair.wait(1.0)
    assert pair.ends["b"].frames == ["stalled"]
    assert pair.ends["a"].lost == []


def test_a_one_way_cut_lets_the_other_direction_through_until_the_session_breaks() -> None:
    pair = Pair()
    pair.net.cut({("a", "b")})
    pair.net.send("a", "b", ["stalled"])
    pair.net.send("b", "a", ["through"])
    pair.wait(0.9)
    assert pair.ends["a"].frames == ["through"]
    pair.wait(5.0)
    assert pair.ends["a"].lost == ["b"]
    assert not pair.net.send("b", "a", ["refused"])


def test_a_silent_death_is_noticed_late_and_a_reset_at_once() -> None:
    silent, reset = Pair(), Pair()
    silent.net.leave("a", silent=True)
    reset.net.leave("a", silent=False)
    silent.wait(0.5)
    reset.wait(0.5)
    assert silent.ends["b"].lost == []
    assert reset.ends["b"].lost == ["a"]
    silent.wait(2.0)
    assert silent.ends["b"].lost == ["a"]


def test_nodes_never_share_an_object() -> None:
    pair = Pair()
    frame = ["mutable"]
    pair.net.send("a", "b", [frame])
    frame.append("changed after it was sent")
    pair.wait(1.0)
    assert pair.ends["b"].frames == [["mutable"]]


def test_a_clock_runs_at_its_rate_and_never_goes_back() -> None:
    schedule = Schedule()
    clock = SimClock(schedule)
    readings = []
    for rate in (2.0, 0.5, 1.0):
        clock.set_rate(rate)
        schedule.run_until(schedule.now_s + 10.0)
        readings.append(clock.monotonic())
    assert readings == [20.0, 25.0, 35.0]
    assert clock.virtual_s_until(clock.monotonic() + 3.0) == 3.0


def test_events_of_one_instant_run_in_the_order_they_were_asked() -> None:
    schedule = Schedule()
    seen: list[int] = []
    for number in range(50):
        schedule.after(1.0, lambda number=number: seen.append(number))  # type: ignore[misc]
    schedule.run_until(2.0)
    assert seen == list(range(50))


def test_streams_of_chance_do_not_disturb_each_other() -> None:
    alone = [stream(7, "disk").random() for _ in range(1)]
    other = stream(7, "net")
    other.random()
    assert [stream(7, "disk").random()] == alone
    assert stream(7, "disk").random() != stream(8, "disk").random()
