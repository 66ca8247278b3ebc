"""GGUF files as llama.cpp itself reads them: the same tokens, the same logits, the same answers, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import NAMES, small

from tunedock.errors import ModelError, RecipeError
from tunedock.export.expected import answer_of, nll_of
from tunedock.export.gguf import quantise as quantiser
from tunedock.export.gguf.reader import LlamaReader
from tunedock.export.gguf.shape import shape_of
from tunedock.export.gguf.vocabulary import vocabulary_of
from tunedock.export.gguf.write import Kind, write
from tunedock.export.probes import TEXTS

pytest.importorskip("llama_cpp", reason="not installed: llama-cpp-python")
CPU = torch.device("cpu")


def written(name: str, folder: Path, kind: Kind, **changes: int) -> tuple[Path, torch.nn.Module, list[int]]:
    made = small(name, **changes)
    rows = made.model.get_input_embeddings().weight.shape[0]
    path = folder / f"{kind}.gguf"
    words = vocabulary_of(made.tokenizer, rows, made.stop_ids)
    write(path, made.model.state_dict(), shape_of(made.model.config), words, kind, name)
    return path, made.model, made.stop_ids


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_reads_the_model(name: str, tmp_path: Path) -> None:
    path, model, stops = written(name, tmp_path, "f32")
    tokenizer = small(name).tokenizer
    reader = LlamaReader(path)
    try:
        ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS.values()}
        assert {text: reader.tokens(text) for text in ids} == ids
        assert set(stops) <= reader.ends()
        prompt = tokenizer("The capital of France is")["input_ids"]
        wanted, found = answer_of(model, prompt, CPU, stops), reader.answer(prompt, stops)
        assert found.tokens == wanted.tokens
        long = (prompt * 40)[:160]  # beyond the windows
        # llama.cpp keeps keys and values in float16.
        np.testing.assert_allclose(reader.nll(long), nll_of(model, long, CPU), atol=0.02)
    finally:
        reader.close()


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_in_other_numbers(kind: Kind, tmp_path: Path) -> None:
    path, model, _ = written("qwen3", tmp_path, kind)
    reader = LlamaReader(path)
    ids = list(range(5, 80))
    off = np.abs(reader.nll(ids) - nll_of(model, ids, CPU)).max()
    reader.close()
    assert 0 < off < {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}[kind]


def test_llama_cpps_own_quantiser(tmp_path: Path) -> None:
    path, _, _ = written("llama3", tmp_path, "f16", hidden_size=256, intermediate_size=512, head_dim=64)
    sizes = {"f16": path.stat().st_size}
    for kind in ("q4_k_m", "q2_k"):
        quantiser.quantise(path, tmp_path / f"{kind}.gguf", kind, threads=1)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
        reader = LlamaReader(tmp_path / f"{kind}.gguf")
        ids = list(range(5, 60))
        assert np.isfinite(reader.nll(ids)).all()
        reader.close()
    assert sizes["q2_k"] < sizes["q4_k_m"] < 0.5 * sizes["f16"]
    with pytest.raises(RecipeError, match=r"llama\.cpp makes no `q9_k`") as caught:
        quantiser.require("q9_k")
    assert "q4_k_m" in str(caught.value.hint)
    with pytest.raises(ModelError, match="quantiser ended with"):
        quantiser.quantise(tmp_path / "none.gguf", tmp_path / "x.gguf", "q4_k_m")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"llama\.cpp does not load it"):
        LlamaReader(tmp_path / "model.gguf")
