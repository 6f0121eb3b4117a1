"""The layers of ARCHITECTURE.md: who may import whom, and who may ask the system."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "agentmem_node": "agentmem_node",
    "agentmem_cluster": "cluster",
    "agentmem_client": "client",
    "agentmem_chaos": "chaos",
}
# Longest prefix wins. A module may import modules of the layers named here, and of its own.
NODE_BASE = ("agentmem_cluster", "agentmem_node.model")
ALLOWED: dict[str, tuple[str, ...]] = {
    "agentmem_client": ("agentmem_cluster.ring", "agentmem_cluster.shardmap"),
    "agentmem_cluster": (),
    "agentmem_cluster.ring": (
        "agentmem_cluster.balance",
        "agentmem_cluster.preferred",
        "agentmem_cluster.zones",
    ),
    "agentmem_cluster.balance": ("agentmem_cluster.zones",),
    "agentmem_cluster.preferred": (),
    "agentmem_cluster.zones": (),
    "agentmem_cluster.shardmap": ("agentmem_cluster.ring",),
    "agentmem_node.model": (
        "agentmem_cluster.epochs.commands",
        "agentmem_cluster.errors",
        "agentmem_cluster.runtime",
        "agentmem_cluster.ring",
    ),
    "agentmem_node.storage": NODE_BASE,
    "agentmem_node.index": (*NODE_BASE, "agentmem_node.storage"),
    "agentmem_node.engine": (*NODE_BASE, "agentmem_node.storage", "agentmem_node.index"),
    "agentmem_node.backup": (
        *NODE_BASE,
        "agentmem_node.storage",
        "agentmem_node.index",
        "agentmem_node.engine",
    ),
    "agentmem_node.providers": (*NODE_BASE, "agentmem_node.config", "agentmem_node.config_keys"),
    "agentmem_node.security": (*NODE_BASE, "agentmem_node.config", "agentmem_node.config_keys"),
    "agentmem_node.observe": (*NODE_BASE, "agentmem_node.config", "agentmem_node.config_keys"),
    "agentmem_node.config": (*NODE_BASE, "agentmem_node.config_keys"),
    "agentmem_node.config_keys": NODE_BASE,
    "agentmem_node.api": (
        *NODE_BASE,
        "agentmem_node.service",
        "agentmem_node.security",
        "agentmem_node.observe",
        "agentmem_node.backup",
        "agentmem_node.config",
        "agentmem_node.config_keys",
    ),
    "agentmem_node.service": ("agentmem_cluster", "agentmem_node"),
    "agentmem_node.run": ("agentmem_cluster", "agentmem_node"),
    "agentmem_node.cli": ("agentmem_cluster", "agentmem_client", "agentmem_node"),
    "agentmem_node.console": ("agentmem_cluster", "agentmem_client", "agentmem_node"),
    "agentmem_node": (),
    "agentmem_chaos": ("agentmem_cluster", "agentmem_client", "agentmem_node"),
}
NEVER = {
    "agentmem_node.service": (
        "agentmem_node.api",
        "agentmem_node.cli",
        "agentmem_node.console",
        "agentmem_node.run",
    )
}
# Nobody may import these packages: they stand on top.
TOPS = ("agentmem_chaos", "benchmarks", "tests")
# The same code runs under the simulator, so time, chance and disk are injected.
DETERMINISTIC = (
    "agentmem_cluster",
    "agentmem_node.model",
    "agentmem_node.storage",
    "agentmem_node.index",
    "agentmem_node.engine",
)
SYSTEM_FILES = {"agentmem_cluster.realtime"}
BANNED = {
    "time": {
        "time",
        "monotonic",
        "sleep",
        "time_ns",
        "monotonic_ns",
        "perf_counter",
        "perf_counter_ns",
    },
    "random": None,
    "secrets": None,
    "uuid": {"uuid1", "uuid4"},
    "os": {"urandom", "getrandom"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imported(path: Path, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def longest_prefix(name: str) -> str:
    return max((p for p in ALLOWED if name == p or name.startswith(p + ".")), key=len)


def test_every_import_points_to_a_lower_layer() -> None:
    wrong = []
    for name, path in modules():
        layer = longest_prefix(name)
        allowed = (layer, *ALLOWED[layer]) if layer != "agentmem_node" else (layer,)
        for target in imported(path, name):
            if not target.startswith(tuple(FOLDERS)):
                continue
            banned = NEVER.get(layer, ()) + (() if layer == "agentmem_chaos" else TOPS)
            inside = any(target == a or target.startswith(a + ".") for a in allowed)
            if not inside or target.startswith(banned):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("banned", sorted(BANNED))
def test_time_and_chance_are_injected(banned: str) -> None:
    wrong = []
    for name, path in modules():
        if not name.startswith(DETERMINISTIC) or name in SYSTEM_FILES:
            continue
        names = BANNED[banned]
        for target in imported(path, name):
            if target == banned and names is None:
                wrong.append(f"{name} imports {banned}")
            if target.startswith(banned + ".") and (names is None or target.split(".")[1] in names):
                wrong.append(f"{name} imports {target}")
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == banned
                and (names is None or node.attr in names)
            ):
                wrong.append(f"{name}:{node.lineno} uses {banned}.{node.attr}")
            if (
                banned == "time"
                and isinstance(node, ast.Attribute)
                and node.attr in {"now", "utcnow", "today"}
            ):
                wrong.append(f"{name}:{node.lineno} asks the clock by .{node.attr}")
    assert wrong == []


def test_nothing_reads_or_writes_pickle() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imported(path, name)
        if target.split(".")[0] in {"pickle", "cPickle", "dill", "shelve", "marshal"}
    ]
    assert wrong == []
