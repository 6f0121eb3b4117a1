"""The previous release: built from this repository's history, installed beside the working tree."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NAMED_IN = Path(__file__).with_name("previous_release.txt")
_BUILD_S_MAX = 240.0


@dataclass(frozen=True, slots=True)
class Release:
    """`folder` has its packages; what they depend on comes from the environment of the tests."""

    commit: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Packages on PYTHONPATH are found before those that are installed for development."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    @property
    def python(self) -> list[str]:
        """-P: the current folder, which may be the working tree, must not be found before them."""
        return [sys.executable, "-P"]

    def run(self, code: str, *arguments: str) -> str:
        """Run Python code with the release's packages; what it printed."""
        return _run([*self.python, "-c", code, *arguments], env=self.environment).decode()


def build(folder: Path) -> Release:
    """The release that `previous_release.txt` names, as its own wheel. Raises RuntimeError."""
    commit = NAMED_IN.read_text().strip()
    source, wheels, target = folder / "source", folder / "wheels", folder / "installed"
    with tarfile.open(fileobj=io.BytesIO(_archive(commit))) as archive:
        archive.extractall(source, filter="data")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)])
    (wheel,) = wheels.glob("*.whl")
    _run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)])
    release = Release(commit, target)
    imported = release.run(
        "import agentmem_client, agentmem_cluster, agentmem_node\n"
        "for one in agentmem_client, agentmem_cluster, agentmem_node: print(one.__file__)"
    )
    for file in imported.split():
        if not Path(file).is_relative_to(target):
            raise RuntimeError(f"the previous release would run {file}, not what is in {target}")
    return release


def _archive(commit: str) -> bytes:
    try:
        return _run(["git", "-C", str(REPOSITORY), "archive", "--format=tar", commit])
    except RuntimeError as error:
        raise RuntimeError(
            f"The previous release, commit {commit} of {NAMED_IN.name}, is not in this "
            "repository's history. A shallow clone lacks it: `git fetch --unshallow`."
        ) from error


def _run(command: list[str], env: dict[str, str] | None = None) -> bytes:
    done = subprocess.run(
        command, capture_output=True, timeout=_BUILD_S_MAX, check=False, env=env, cwd="/"
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command[:6])} ... ended with {done.returncode}:\n"
            + done.stderr.decode(errors="replace")[-2_000:]
        )
    return done.stdout
