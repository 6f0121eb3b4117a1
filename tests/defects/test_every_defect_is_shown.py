"""D1 to D16: each is shown in the released library and its absence in ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range(1, 17))
@pytest.mark.parametrize("side", ["released", "ours"])
def test_every_defect_is_shown_on_both_sides(number: int, side: str) -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_defects_*.py")]
    assert re.search(rf"^def test_d{number:02}_{side}_", "\n".join(sources), re.MULTILINE)
