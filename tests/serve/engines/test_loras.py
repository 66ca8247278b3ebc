"""Several adapters on one base, in one step: each request gets what PEFT gives it alone, and adapters come and go meanwhile."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import CPU, asked, by_generate, ids, prompts, together
from peft import LoraConfig, PeftModel, get_peft_model
from test_batching import LIMITS, lively

from tunedock.errors import ModelError, RecipeError
from tunedock.serve.engines.batching import Engine
from tunedock.serve.engines.compute import Paged
from tunedock.serve.engines.loading import from_model

KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "few": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "o_proj"],
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 20},
    },
}  # fmt: skip


def saved(base: Any, folder: Path, seed: int, **settings: Any) -> str:
    """An adapter that changes answers."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: saved(lively("qwen3"), root / name, i, **kind) for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture
def engine(folders: dict[str, str]) -> Any:
    made = from_model(lively("qwen3"), CPU, adapters=folders, limits=LIMITS)
    yield made
    made.close()


def by_peft(folder: str | None, prompt: list[int], most: int) -> list[int]:
    base = lively("qwen3")
    return by_generate(base if folder is None else PeftModel.from_pretrained(base, folder).eval(), prompt, most)


def test_each_as_by_peft(engine: Engine, folders: dict[str, str]) -> None:
    assert engine.adapters() == sorted(folders)
    names = [None, "all", "few", "patterns"] * 2
    asks = prompts(engine._compute.vocabulary, (60, 12, 33, 5, 21, 8, 1, 70))
    got = together(engine, [asked(p, 15, adapter=name) for p, name in zip(asks, names, strict=True)])
    wanted = [by_peft(name and folders[name], p, 15) for p, name in zip(asks, names, strict=True)]
    assert [ids(tokens) for tokens in got] == wanted
    same = [ids(tokens) for tokens in together(engine, [asked(asks[0], 15, adapter=name) for name in names[:4]])]
    assert len(set(map(tuple, same))) == 4, "the adapters change nothing"


def test_one_by_one_too(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paged, "prove", lambda self: "it is to be so")
    engine = from_model(lively("qwen3"), CPU, adapters=folders, limits=LIMITS)
    asks = prompts(engine._compute.vocabulary, (30, 12))
    got = together(engine, [asked(asks[0], 10, adapter="all"), asked(asks[1], 10)])
    engine.close()
    assert [ids(t) for t in got] == [by_peft(folders["all"], asks[0], 10), by_peft(None, asks[1], 10)]


def test_replaced_and_dropped_while_at_work(engine: Engine, folders: dict[str, str]) -> None:
    prompt = prompts(engine._compute.vocabulary, (20,))[0]

    async def during() -> tuple[list[int], list[int]]:
        before = engine.submit(asked(prompt, 60, adapter="all"))
        first = await before.__anext__()
        await asyncio.to_thread(engine.load_adapter, "all", folders["few"])
        after = engine.submit(asked(prompt, 20, adapter="all"))
        await after.__anext__()
        engine.drop_adapter("all")
        with pytest.raises(ValueError, match="no adapter 'all'"):
            engine.submit(asked(prompt, 20, adapter="all"))
        return [first.id] + [t.id async for t in before], [t.id async for t in after]

    old, new = asyncio.run(during())
    assert old == by_peft(folders["all"], prompt, 60)
    assert new == by_peft(folders["few"], prompt, 20)[1:]
    assert engine.adapters() == ["few", "patterns"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is not a linear layer that is given every token"),
    ],
)
def test_what_must_be_merged(engine: Engine, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    folder = saved(lively("qwen3"), tmp_path / "a", 1, **{"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(ModelError, match=match) as caught:
        engine.load_adapter("strange", folder)
    assert "merge" in str(caught.value.hint)
    assert "strange" not in engine.adapters()


def test_what_does_not_fit(engine: Engine, folders: dict[str, str], tmp_path: Path) -> None:
    other = saved(lively("llama3", hidden_size=32), tmp_path / "other", 1, **KINDS["few"])
    with pytest.raises(ModelError, match="q_proj is 64 -> 64, and its part 32 -> 64"):
        engine.load_adapter("other", other)
    deeper = saved(lively("qwen3", num_hidden_layers=3), tmp_path / "deeper", 1, **KINDS["few"])
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.q_proj is not there"):
        engine.load_adapter("deeper", deeper)
    with pytest.raises(RecipeError, match="no folder with an adapter"):
        engine.load_adapter("none", str(tmp_path))
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(ModelError, match="cut off or damaged"):
        engine.load_adapter("other", other)
