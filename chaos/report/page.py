"""Puts the data of a run into the page."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.runs.result import OPERATIONS, TIMELINE, load

_HERE = "agentmem_chaos.report"


def write_page(folder: Path) -> Path:
    """Write the timeline of the run in `folder`. Raises ChaosError."""
    try:
        operations = json.loads((folder / OPERATIONS).read_text())
        page = render(load(folder), operations)
        path = folder / TIMELINE
        path.write_text(page)
    except (OSError, ValueError) as error:
        raise ChaosError(f"The timeline of {folder} cannot be written: {error}.") from error
    return path


def render(result: dict[str, object], operations: list[object]) -> str:
    """The whole page: style, script and data inside."""
    parts = files(_HERE)
    data = json.dumps({"result": result, "operations": operations}, separators=(",", ":"))
    # Inside a script element, only "</" and "<!--" could end the data.
    data = data.replace("<", "\\u003c")
    title = html.escape(f"{result['scenario']}, seed {result['seed']}")
    page = (parts / "page.html").read_text()
    for name, value in (
        ("TITLE", title),
        ("STYLE", (parts / "page.css").read_text()),
        ("SCRIPT", (parts / "page.js").read_text()),
        ("DATA", data),
    ):
        page = page.replace("{{" + name + "}}", value, 1)
    return page
