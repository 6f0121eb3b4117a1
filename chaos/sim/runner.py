"""Many worlds over several processes, each from its own seed, reported as they end."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from agentmem_chaos.sim.plan import WorldPlan
from agentmem_chaos.sim.result import WorldResult

# A worker is replaced after this many worlds: whatever a world leaks goes with it.
WORLDS_PER_WORKER = 100
# Of the worlds of a run this share has seeds that nobody has tried before.
ROTATING_SHARE = 1 / 6
ROTATING_SEED_MIN = 1_000_000


@dataclass(frozen=True, slots=True)
class Order:
    """Which world to play; everything else about it follows from the seed."""

    seed: int
    nodes: int | None = None
    seconds: float | None = None
    story: bool = False

    @property
    def command(self) -> str:
        """What to type to play this world again, with its story."""
        words = ["agentmem-chaos sim", f"--seed {self.seed}"]
        if self.nodes is not None:
            words.append(f"--nodes {self.nodes}")
        if self.seconds is not None:
            words.append(f"--seconds {self.seconds:g}")
        return " ".join([*words, "--story"])


@dataclass(frozen=True, slots=True)
class Outcome:
    order: Order
    result: WorldResult
    cpu_s: float  # of this process: what the world costs, whatever else the machine does


def play(order: Order) -> Outcome:
    """Play one world in this process. A harness that fails is a failed world, never a pass."""
    # Here, not above: the command line must answer --help without loading the Raft library.
    from agentmem_chaos.sim.world import World

    begun_s = time.process_time()
    with quiet():
        try:
            plan = WorldPlan.draw(order.seed, nodes=order.nodes, seconds=order.seconds)
            result = World(plan, story=order.story).run()
        except Exception:
            trace = traceback.format_exc()
            result = WorldResult(order.seed, [f"the world itself failed:\n{trace}"])
    return Outcome(order, result, time.process_time() - begun_s)


@contextmanager
def quiet() -> Iterator[None]:
    """Around worlds: no log lines, no garbage collection."""
    # The story tells what nodes would log, in virtual time.
    logs = [logging.getLogger(name) for name in ("agentmem_cluster", "agentmem")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    gc.disable()  # a world's objects live as long as it does: looking for garbage costs a tenth
    gc.freeze()  # and what was there before it need not be looked through after it
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        gc.enable()
        gc.collect()
        gc.unfreeze()


def play_all(orders: Sequence[Order], *, jobs: int) -> Iterator[Outcome]:
    """Play worlds in `jobs` processes; outcomes come as they end."""
    if jobs == 1 or len(orders) == 1:
        yield from map(play, orders)
        return
    # spawn, not fork: a worker starts clean and behaves as a world replayed by hand does.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=WORLDS_PER_WORKER) as pool:
        yield from pool.imap_unordered(play, orders)


def rotating_seed() -> int:
    """A first seed that no run had before. Printed, so that it can be given again."""
    return ROTATING_SEED_MIN + int.from_bytes(os.urandom(5), "big") % 10**9


def seeds(worlds: int, rotating: int) -> list[int]:
    """Fixed seeds, so that a regression shows; and some new ones, so that the net widens."""
    new = int(worlds * ROTATING_SHARE)
    return [*range(1, worlds - new + 1), *range(rotating, rotating + new)]
