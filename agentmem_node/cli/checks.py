"""What `agentmem doctor` looks at. Each check is a function from settings to a verdict.

A verdict that is not `ok` says what to do about it. Checks never change anything that stays:
the fsync check writes a small file into the data directory and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from agentmem_node.config import Config, ConfigError, check_startup, split_address

_FSYNC_ROUNDS = 20
_FSYNC_BYTES = 4096
_FSYNC_MS_GOOD = 10.0
_FSYNC_MS_BAD = 100.0
_FREE_BYTES_GOOD = 2 << 30
_OPEN_FILES_GOOD = 4096
_OPEN_FILES_LEAST = 1024
# 2026-01-01: a clock before this release is certainly wrong.
_YEAR_LEAST_S = 1_767_225_600
_CLOCK_PROBE_S = 0.05
_CLOCK_DRIFT_S_MAX = 0.02
_PYTHON_LEAST = (3, 11)


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do when it is not `ok`."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_python(_config: Config) -> Finding:
    version = platform.python_version()
    if sys.version_info < _PYTHON_LEAST:
        return Finding(
            "python", Verdict.FAIL, version, "Install Python 3.11 or newer and set up again."
        )
    if not sys.maxsize > 2**32:
        return Finding(
            "python",
            Verdict.FAIL,
            f"{version}, 32 bit",
            "Use a 64-bit Python: databases are mapped into memory.",
        )
    return Finding("python", Verdict.OK, f"{version} on {sys.platform} {platform.machine()}")


def check_packages(_config: Config) -> Finding:
    needed = ("lmdb", "numpy", "faiss", "tantivy", "fastembed", "msgspec", "pysyncobj")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(
            "packages",
            Verdict.FAIL,
            f"missing: {', '.join(missing)}",
            "pip install 'agentmem-cluster[node]'",
        )
    if importlib.util.find_spec("uvloop") is None:
        return Finding(
            "packages",
            Verdict.WARN,
            "uvloop is missing",
            "pip install uvloop: the event loop is about twice as fast with it.",
        )
    return Finding("packages", Verdict.OK, "all there, uvloop too")


def check_settings(config: Config) -> Finding:
    try:
        check_startup(config)
    except ConfigError as error:
        return Finding("settings", Verdict.FAIL, "would refuse to start", str(error))
    kind = f"member {config.node.id} of {len(config.cluster.nodes)} nodes"
    alone = not config.cluster.nodes
    return Finding("settings", Verdict.OK, "a single node" if alone else kind)


def check_ports(config: Config) -> Finding:
    addresses = [config.node.listen]
    if config.peer_listen is not None:
        addresses.append(config.peer_listen)
    taken, impossible = [], []
    for address in addresses:
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    taken.append(address)
                else:
                    impossible.append(f"{address} ({error.strerror})")
    if impossible:
        return Finding(
            "ports",
            Verdict.FAIL,
            f"cannot listen on {', '.join(impossible)}",
            "Choose an address of this machine and a port above 1023 with --listen.",
        )
    if taken:
        return Finding(
            "ports",
            Verdict.WARN,
            f"{', '.join(taken)} in use",
            "Fine when it is this node that runs already; else choose another with --listen.",
        )
    return Finding("ports", Verdict.OK, f"{', '.join(addresses)} free")


def check_disk(config: Config) -> Finding:
    directory = _existing(Path(config.node.data_dir))
    free = shutil.disk_usage(directory).free
    shown = f"{free / (1 << 30):,.1f} GiB free for {config.node.data_dir}"
    least = config.limits.disk_free_bytes_min
    if free <= least:
        return Finding(
            "disk",
            Verdict.FAIL,
            shown,
            f"Writes are refused below {least >> 20} MiB (limits.disk_free_bytes_min): free "
            "some, or choose another directory with --data.",
        )
    if not os.access(directory, os.W_OK):
        return Finding(
            "disk",
            Verdict.FAIL,
            f"{directory} is not writable",
            "Give this user the right to write there, or choose another with --data.",
        )
    if free < _FREE_BYTES_GOOD:
        return Finding("disk", Verdict.WARN, shown, "A busy node soon needs more than that.")
    return Finding("disk", Verdict.OK, shown)


def check_fsync(config: Config) -> Finding:
    directory = _existing(Path(config.node.data_dir))
    times_ms: list[float] = []
    try:
        descriptor, path = tempfile.mkstemp(prefix=".agentmem-doctor-", dir=directory)
        try:
            for _ in range(_FSYNC_ROUNDS):
                os.write(descriptor, b"\0" * _FSYNC_BYTES)
                started = time.perf_counter()
                # What the journal calls where the system has it.
                getattr(os, "fdatasync", os.fsync)(descriptor)
                times_ms.append((time.perf_counter() - started) * 1000)
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                Path(path).unlink()
    except OSError as error:
        return Finding(
            "fsync",
            Verdict.FAIL,
            f"cannot write to {directory}: {error.strerror}",
            "Give this user the right to write there, or choose another with --data.",
        )
    typical, worst = statistics.median(times_ms), max(times_ms)
    shown = f"{typical:.2f} ms, at worst {worst:.1f} ms"
    if typical > _FSYNC_MS_BAD:
        return Finding(
            "fsync",
            Verdict.FAIL,
            shown,
            "Every acknowledged write waits for this: use a local SSD, not a network or USB disk.",
        )
    if typical > _FSYNC_MS_GOOD:
        return Finding(
            "fsync",
            Verdict.WARN,
            shown,
            "Each write waits this long; many at once share one. A local SSD takes about 1 ms.",
        )
    return Finding("fsync", Verdict.OK, shown)


def check_clock(_config: Config) -> Finding:
    if time.time() < _YEAR_LEAST_S:
        return Finding(
            "clock",
            Verdict.FAIL,
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "The date is wrong: set the clock, best by NTP. Memories would carry wrong times.",
        )
    wall, steady = time.time(), time.monotonic()
    time.sleep(_CLOCK_PROBE_S)
    drift_s = abs((time.time() - wall) - (time.monotonic() - steady))
    if drift_s > _CLOCK_DRIFT_S_MAX:
        return Finding(
            "clock",
            Verdict.WARN,
            f"jumped {drift_s * 1000:.0f} ms while looked at",
            "Consensus uses another clock and is safe, but record times jump: check NTP.",
        )
    return Finding("clock", Verdict.OK, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def check_open_files(_config: Config) -> Finding:
    try:
        import resource
    except ImportError:  # not on this system
        return Finding("open files", Verdict.OK, "no limit known")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES_GOOD:
        return Finding("open files", Verdict.OK, f"limit {soft:,}")
    verdict = Verdict.WARN if soft >= _OPEN_FILES_LEAST else Verdict.FAIL
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    return Finding(
        "open files",
        verdict,
        f"limit {soft:,} (may be raised to {most})",
        f"ulimit -n {_OPEN_FILES_GOOD}: each connection and each shard needs a few.",
    )


def check_memory(_config: Config) -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", Verdict.OK, "unknown")
    cores = os.cpu_count() or 1
    shown = f"{total / (1 << 30):.1f} GiB, {cores} cores"
    if total < 1 << 30:
        return Finding(
            "memory",
            Verdict.WARN,
            shown,
            "A node with the embedding model needs about 0.5 GiB, and 1 KiB for each memory.",
        )
    return Finding("memory", Verdict.OK, shown)


def check_model(config: Config) -> Finding:
    if config.embedding.provider == "none":
        return Finding("model", Verdict.OK, "none wanted: searches by words only")
    from agentmem_cluster.errors import ModelUnavailable
    from agentmem_node.providers.minilm import MiniLmEngine
    from agentmem_node.providers.model_files import MODEL_NAME, cache_dir, is_complete, model_dir

    cache = Path(config.embedding.model_dir) if config.embedding.model_dir else cache_dir()
    directory = model_dir(cache)
    if not is_complete(directory):
        return Finding(
            "model",
            Verdict.WARN,
            f"{MODEL_NAME} is not in {cache}",
            "The first start fetches it (83 MB); `python -m agentmem_node.providers.fetch` does "
            'so now. Without vectors: --set embedding.provider="none".',
        )
    try:
        started = time.perf_counter()
        engine = MiniLmEngine(directory, 1)
        engine.check()
    except ModelUnavailable as error:
        return Finding("model", Verdict.FAIL, error.message, error.hint)
    took_s = time.perf_counter() - started
    return Finding("model", Verdict.OK, f"{MODEL_NAME} loads in {took_s:.1f} s and computes right")


def _existing(path: Path) -> Path:
    """`path`, or the nearest parent that exists."""
    path = path.absolute()
    while not _is_directory(path):
        path = path.parent
    return path


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # in a directory where this user may not look
        return False


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    check_python,
    check_packages,
    check_settings,
    check_ports,
    check_disk,
    check_fsync,
    check_clock,
    check_open_files,
    check_memory,
    check_model,
)
