"""The commands against the same small cluster as the client's tests."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentmem_node.cli.app import run

fake = runpy.run_path(str(Path(__file__).parent.parent / "client" / "conftest.py"))["fake"]


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def agentmem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Runs `agentmem ARGUMENTS` in this process; output counts as piped unless `terminal`."""
    for name in ("AGENTMEM_URL", "AGENTMEM_API_KEY", "AGENTMEM_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, terminal: bool = False) -> Ran:
        import sys

        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setenv("COLUMNS", "160")
            if terminal:
                patched.setattr(sys.stdout, "isatty", lambda: True)
            code = run(list(arguments))
        out, err = capsys.readouterr()
        return Ran(int(code), out, err)

    return call
