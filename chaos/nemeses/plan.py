"""When what strikes: a function of the seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CALM_FIRST_S = 2.0
CALM_BETWEEN_S = (1.5, 3.0)


@dataclass(frozen=True, slots=True)
class Strike:
    """`at_s` counts from the first operation; what struck before may still be undone then, and
    the strike waits for it. `seed` is for what is drawn as it strikes: targets and amounts."""

    at_s: float
    hold_s: float
    nemesis: str
    seed: int


def plan(
    nemeses: Sequence[str], holds_s: Mapping[str, tuple[float, float]], seconds: float, seed: int
) -> tuple[Strike, ...]:
    """Strikes for `seconds`: every nemesis once, in an order of the seed's, before any again."""
    if not nemeses:
        return ()
    chance = random.Random(f"plan:{seed}")
    strikes: list[Strike] = []
    at_s = CALM_FIRST_S
    while True:
        for name in chance.sample(list(nemeses), len(nemeses)):
            hold_s = chance.uniform(*holds_s[name])
            if at_s + hold_s > seconds and strikes:
                return tuple(strikes)
            strikes.append(Strike(round(at_s, 3), round(hold_s, 3), name, chance.getrandbits(32)))
            at_s += hold_s + chance.uniform(*CALM_BETWEEN_S)
