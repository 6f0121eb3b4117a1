"""Ten virtual hours of worlds: fixed seeds show a regression, new ones widen the net."""

from __future__ import annotations

import os
import time

import pytest

from agentmem_chaos.cli import pauses
from agentmem_chaos.sim.runner import Order, play_all, rotating_seed, seeds

WORLDS = 600
JOBS = 2
# Under eight minutes on two cores that have nothing else to do.
CPU_S_MAX = WORLDS * 1.6


@pytest.mark.timeout(900)
def test_ten_virtual_hours_of_faults_violate_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rotating = int(os.environ.get("AGENTMEM_SIM_SEED", 0)) or rotating_seed()
    orders = [Order(seed) for seed in seeds(WORLDS, rotating)]
    with capsys.disabled():
        print(f"\n{WORLDS} worlds; rotating seeds from {rotating} (AGENTMEM_SIM_SEED={rotating})")
    begun_s = time.monotonic()
    outcomes = list(play_all(orders, jobs=JOBS))
    took_s = time.monotonic() - begun_s

    failures = [
        f"{outcome.order.command}\n" + "\n".join(outcome.result.violations)
        for outcome in sorted(outcomes, key=lambda outcome: outcome.order.seed)
        if not outcome.result.passed
    ]
    assert not failures, "\n\n".join(failures)
    results = [outcome.result for outcome in outcomes]
    with capsys.disabled():
        print(
            f"{sum(r.seconds for r in results) / 3600:,.2f} virtual hours in {took_s:.0f} s: "
            f"{sum(r.calls for r in results):,} operations, "
            f"{sum(r.acknowledged for r in results):,} writes acknowledged, "
            f"{sum(r.reads for r in results):,} linearizable reads, "
            f"{sum(r.faults for r in results):,} faults, "
            f"{sum(r.elections for r in results):,} elections, "
            f"{sum(r.moves for r in results):,} moves, {sum(r.splits for r in results):,} splits "
            f"and {sum(r.rewinds for r in results):,} rewinds among them; "
            f"writes paused {pauses(outcomes)}"
        )
    assert len(results) == WORLDS
    assert {r.nodes for r in results} == {3, 4, 5}
    kinds = {(r.engine, r.core_clients) for r in results}
    assert kinds == {(e, c) for e in ("registers", "shard") for c in (False, True)}
    assert {(r.engine, r.has_moves) for r in results} == {
        (e, m) for e in ("registers", "shard") for m in (False, True)
    }
    assert all(r.seconds >= 60.0 for r in results)
    # A harness that does nothing finds nothing: these worlds must have been busy ones.
    assert sum(r.seconds for r in results) >= 10 * 3600
    assert sum(r.calls for r in results) >= 500_000
    assert sum(r.acknowledged for r in results) > 100 * WORLDS
    assert sum(r.reads for r in results) > 100 * WORLDS
    assert sum(r.faults for r in results) > 10 * WORLDS
    assert sum(r.elections for r in results) > 2 * WORLDS
    assert sum(r.moves for r in results) > WORLDS / 2
    assert sum(r.splits for r in results) > WORLDS / 15
    assert sum(r.rewinds for r in results) > WORLDS / 50
    assert sum(r.left_behind > 0 for r in results) < WORLDS * 0.05
    assert sum(o.cpu_s for o in outcomes) < CPU_S_MAX, "worlds have become too slow"


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_other_sizes_of_cluster_hold_too(nodes: int) -> None:
    for outcome in play_all([Order(seed, nodes=nodes, seconds=30.0) for seed in (1, 2, 3)], jobs=1):
        assert outcome.result.violations == [], outcome.order.command
        assert outcome.result.acknowledged > 0
