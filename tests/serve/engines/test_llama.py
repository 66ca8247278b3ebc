"""llama.cpp behind the same engine: many sequences in one context, each as alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from asking import asked, by_generate, ids, prompts, together, until_idle
from test_batching import lively

import families
from tunedock.errors import ModelError
from tunedock.export.gguf.shape import shape_of
from tunedock.export.gguf.vocabulary import vocabulary_of
from tunedock.export.gguf.write import write
from tunedock.serve.engines.batching import Engine, Limits
from tunedock.serve.engines.generator import EngineGone, Sampling

pytest.importorskip("llama_cpp", reason="not installed: llama-cpp-python")
from tunedock.serve.engines.llama import from_gguf

LIMITS = Limits(running=5, chunk=40, longest=512, cache_bytes=8 << 20)


def written(family: str, folder: Path) -> Path:
    model = lively(family)
    path = folder / f"{family}.gguf"
    words = vocabulary_of(families.tokenizer(family), model.config.vocab_size, sorted(families.stop_ids(family)))
    write(path, model.state_dict(), shape_of(model.config), words, "f32", family)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("qwen3", tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def engine(file: Path) -> Any:
    made = from_gguf(file, limits=LIMITS, float32_cache=True)
    yield made
    made.close()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma"])
def test_together_as_transformers_alone(family: str, tmp_path: Path) -> None:
    engine, model = from_gguf(written(family, tmp_path), limits=LIMITS, float32_cache=True), lively(family)
    asks = prompts(engine._compute.vocabulary, (3, 150, 41, 1, 90, 17, 64, 33))
    got = together(engine, [asked(prompt, 16) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 16) for prompt in asks]


def test_a_seed_and_likelihoods(engine: Engine) -> None:
    asks = prompts(engine._compute.vocabulary, (9, 60, 21))
    requests = [asked(p, 12, Sampling(temperature=0.9, top_p=0.9, seed=i), top_logprobs=2) for i, p in enumerate(asks)]
    alone = [together(engine, [request])[0] for request in requests]
    beside = together(engine, [asked(asks[0], 30, Sampling()), *requests])[1:]
    assert [ids(tokens) for tokens in beside] == [ids(tokens) for tokens in alone]
    with torch.no_grad():
        whole = torch.tensor([asks[1] + ids(alone[1])])
        logprobs = torch.log_softmax(lively("qwen3")(input_ids=whole).logits[0], -1)
    for place, token in enumerate(alone[1]):
        assert token.logprob == pytest.approx(float(logprobs[len(asks[1]) + place - 1, token.id]), abs=2e-3)


def test_who_leaves_frees_everything(engine: Engine) -> None:
    async def leave() -> None:
        streams = [engine.submit(asked([1, 2, 3], 400)) for _ in range(8)]
        await streams[0].__anext__()
        for stream in streams:
            await stream.aclose()

    asyncio.run(leave())
    until_idle(engine, 10)
    assert engine.load().cache_used == 0.0


def test_little_memory_is_shared_out(file: Path) -> None:
    kept = 2 * 2 * 2 * 16 * 4
    engine = from_gguf(
        file, limits=Limits(running=5, chunk=64, longest=256, cache_bytes=256 * kept), float32_cache=True
    )
    assert engine.load().more["cache_tokens"] == 256
    asks = prompts(engine._compute.vocabulary, (30, 40, 20, 33, 25))
    got = together(engine, [asked(prompt, 60) for prompt in asks])
    assert engine.load().more["put_back"] > 0
    engine.close()
    model = lively("qwen3")
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 60) for prompt in asks]


def lora_file(path: Path, scale: float) -> Path:
    """A LoRA on the queries of both layers, as llama.cpp's own converter writes it."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    draw = np.random.Generator(np.random.Philox(3))
    for layer in range(2):
        for part, shape in (("lora_a", (4, 64)), ("lora_b", (64, 4))):
            values = draw.normal(scale=scale, size=shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.attn_q.weight.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_lora(path: Path) -> Any:
    model = lively("qwen3")
    found = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            a, b = (found[f"blk.{number}.attn_q.weight.{part}"] for part in ("lora_a", "lora_b"))
            layer.self_attn.q_proj.weight += b @ a
    return model


def test_adapters_come_and_go(engine: Engine, tmp_path: Path) -> None:
    first, second = lora_file(tmp_path / "a.gguf", 0.6), lora_file(tmp_path / "b.gguf", 0.9)
    prompt = prompts(engine._compute.vocabulary, (20,))[0]
    engine.load_adapter("one", str(first))

    async def during() -> list[list[int]]:
        streams = [engine.submit(asked(prompt, 40, adapter=name)) for name in ("one", None)]
        begun = [[(await stream.__anext__()).id] for stream in streams]
        await asyncio.to_thread(engine.load_adapter, "one", str(second))
        streams.append(engine.submit(asked(prompt, 40, adapter="one")))
        begun.append([])
        return [had + [token.id async for token in stream] for had, stream in zip(begun, streams, strict=True)]

    got = asyncio.run(during())
    models = (with_lora(first), lively("qwen3"), with_lora(second))
    assert got == [by_generate(model, prompt, 40) for model in models]
    assert len(set(map(tuple, got))) == 3


def test_what_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapters from GGUF files"):
        engine.load_adapter("folder", str(tmp_path))
    (tmp_path / "none.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="does not take this adapter"):
        engine.load_adapter("none", str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="does not load it"):
        from_gguf(tmp_path / "none.gguf")


def test_closing_tells_those_who_wait(engine: Engine) -> None:
    async def during() -> None:
        stream = engine.submit(asked([1, 2, 3], 400))
        await stream.__anext__()
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineGone, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(during())
