"""What programs are told of runs, folders and files, read without them; and what they cannot compute."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tunedock.errors import DependencyError, ModelError, RecipeError, RunError, TunedockError
from tunedock.recipe.serving import Backend, Program, ServeOrder, Start
from tunedock.run.record import Run, RunState
from tunedock.serve.engines.child import ChildEngine
from tunedock.serve.models import Served
from tunedock.serve.programs import started

QWEN = "{% if enable_thinking %}<think></think>{% endif %}<tool_call>"
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none"}


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of these names are on PATH; nobody starts them here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "sglang", "llama-server", "ollama"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def run_of(place: Path, recipe: Mapping[str, Any] | None = None, adapter: Mapping[str, Any] | None = LORA) -> Path:
    """A finished run whose base is at `place / "base"`."""
    (place / "base").mkdir()
    whole = {"model": {"path": str(place / "base")}, "data": {"train": "x.jsonl"}, **(recipe or {})}
    state = RunState(
        "support", 0.0, "sft", "base", "lora", "abc", lineage={"folder": str(place / "base"), "data": "d1"}
    )
    run = Run.create(place / "support", recipe_yaml="", resolved={"recipe": whole}, state=state)
    folder_of(run.model, {"system": "Be brief."}, **({"adapter_config.json": adapter} if adapter else {}))
    return run.path


def folder_of(folder: Path, facts: Mapping[str, Any] | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(QWEN)
    (folder / "chat.json").write_text(
        json.dumps({"stop_ids": [2, 7], "thinking": False, "system": None, **(facts or {})})
    )
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def served(
    kind: str, place: Path, program: str, *, adapters: Mapping[str, str] | None = None, **start: Any
) -> list[Served]:
    backend = Backend(name="support", kind=kind, place=str(place), adapters=dict(adapters or {}))  # type: ignore[arg-type]
    order = ServeOrder(backends=[backend], longest=4096)
    return started(backend, Start(program=cast(Program, program), **start), order, print, print)


def told(one: Served) -> list[str]:
    assert isinstance(one.engine, ChildEngine)
    return list(one.engine._command.arguments)


def after(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_a_run_with_an_adapter(tmp_path: Path) -> None:
    """Its base with the adapter beside it, the run's own tokenizer, its system prompt and stops: as it was trained."""
    other = folder_of(tmp_path / "fr", **{"adapter_config.json": {**LORA, "r": 64}})
    own, french = served("run", run_of(tmp_path), "vllm", adapters={"fr": str(other)}, tensor_parallel_size=4)
    arguments = told(own)
    assert arguments[:3] == ["vllm", "serve", str(tmp_path / "base")]
    assert after(arguments, "--tokenizer") == str(tmp_path / "support/model")
    assert after(arguments, "--tensor-parallel-size") == "4" and after(arguments, "--max-model-len") == "4096"
    assert after(arguments, "--max-lora-rank") == "64" and after(arguments, "--reasoning-parser") == "qwen3"
    assert after(arguments, "--lora-modules") == f"support={tmp_path}/support/model" and f"fr={other}" in arguments
    assert (own.name, own.model, own.adapter) == ("support", "the-base", "support")
    assert (french.name, french.model, french.adapter) == ("fr", "the-base", "fr") and french.engine is own.engine
    assert own.lineage["run"] == "support" and french.lineage["adapter"] == "fr"
    assert isinstance(own.engine, ChildEngine)
    trained = own.engine._remote._trained
    assert (trained.system, trained.thinking, trained.stop_ids) == ("Be brief.", False, (2, 7))
    assert own.engine._secret is not None and not any(own.engine._secret in part for part in arguments)


def test_a_run_of_all_weights_and_an_export(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"adapter": {"kind": "full"}}, adapter=None)
    assert told(served("run", run, "sglang")[0])[:4] == ["sglang", "serve", "--model-path", f"{run}/model"]
    folder = folder_of(tmp_path / "hf", **{"export.json": {"run": "support", "format": "hf"}})
    [own] = served("folder", folder, "sglang", arguments=["--mem-fraction-static=0.8"])
    assert told(own)[3] == str(folder) and told(own)[-1] == "--mem-fraction-static=0.8"
    assert (own.model, own.adapter, own.lineage["run"]) == ("support", None, "support")


def test_a_base_that_is_on_the_hub(tmp_path: Path) -> None:
    run = Run(run_of(tmp_path, {"model": {"path": "Qwen/Qwen3-8B"}, "quantize": "nf4"}))
    state = run.state()
    state = replace(state, lineage={**state.lineage, "folder": "/gone", "commit": "9c925d6"})
    run.write_state(state)
    arguments = told(served("run", run.path, "vllm")[0])
    assert arguments[2] == "Qwen/Qwen3-8B" and after(arguments, "--revision") == "9c925d6"
    assert after(arguments, "--quantization") == "bitsandbytes"


def test_gguf_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "gguf", {"system": "Be brief."})
    folder_of(folder / "tokenizer")
    (folder / "model.gguf").write_bytes(b"GGUF")
    [own] = served("gguf", folder, "llama-server")
    assert after(told(own), "--model") == f"{folder}/model.gguf"
    assert after(told(own), "--chat-template-kwargs") == '{"enable_thinking": false}'
    assert isinstance(own.engine, ChildEngine) and own.engine._remote._trained.system == "Be brief."
    [own] = served("gguf", folder / "model.gguf", "ollama")
    assert own.model == "served" and isinstance(own.engine, ChildEngine)
    assert own.engine._command.files == {"Modelfile": f"FROM {folder}/model.gguf\n"}
    (folder / "Modelfile").write_text("FROM ./model.gguf")
    [own] = served("gguf", folder, "ollama")
    assert isinstance(own.engine, ChildEngine) and own.engine._command.then[0][-1] == f"{folder}/Modelfile"


def test_a_gateway_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It takes our token by a secret that only its environment has."""
    run = run_of(tmp_path)
    [own] = served("run", run, "tunedock")
    assert f"support={run}" in told(own) and (own.model, own.adapter) == ("support", None)
    assert isinstance(own.engine, ChildEngine)
    header = own.engine._remote._headers["Authorization"].removeprefix("Bearer ")
    assert header.count(".") == 2 and own.engine._secret in own.engine._command.environment.values()


@pytest.mark.parametrize(
    ("adapter", "recipe", "error", "says"),
    [
        ({**LORA, "use_dora": True}, {}, ModelError, "do not compute `use_dora`"),
        ({**LORA, "rank_pattern": {"q": 4}}, {}, ModelError, "do not compute `rank_pattern`"),
        ({**LORA, "bias": "all"}, {}, ModelError, "it has biases"),
        ({**LORA, "peft_type": "IA3"}, {}, ModelError, "it is a IA3"),
        (LORA, {"model": {"path": "/base", "add_tokens": ["<x>"]}}, ModelError, "was changed before it"),
        (LORA, {"objective": "reward"}, RecipeError, "a reward model scores"),
    ],
)
def test_what_other_programs_cannot_compute(
    tmp_path: Path, adapter: Mapping[str, Any], recipe: Mapping[str, Any], error: type[TunedockError], says: str
) -> None:
    with pytest.raises(error) as caught:
        served("run", run_of(tmp_path, recipe, adapter), "vllm")
    assert says in caught.value.message and caught.value.hint


def test_kinds_that_do_not_fit(tmp_path: Path) -> None:
    run, hf = run_of(tmp_path), folder_of(tmp_path / "hf")
    with pytest.raises(RecipeError, match="computes GGUF files"):
        served("run", run, "llama-server")
    with pytest.raises(RecipeError, match="computes no GGUF file"):
        served("gguf", hf, "vllm")
    with pytest.raises(RecipeError, match="without adapters"):
        served("gguf", hf, "ollama", adapters={"fr": "/fr"})
    with pytest.raises(RecipeError, match="is no name for vllm"):
        served("folder", hf, "vllm", adapters={"-fr": "/fr"})
    with pytest.raises(ModelError, match="there is no adapter here"):
        served("folder", hf, "vllm", adapters={"fr": str(hf)})
    (run / "model" / "adapter_config.json").unlink()
    (run / "model").rename(run / "elsewhere")
    with pytest.raises(RunError, match="has no result yet"):
        served("run", run, "vllm")


@pytest.mark.parametrize("program", ["vllm", "sglang", "llama-server", "ollama"])
def test_a_program_that_is_not_here(tmp_path: Path, programs: Path, program: str) -> None:
    (programs / program).unlink()
    folder = folder_of(tmp_path / "m")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(DependencyError) as caught:
        served("folder" if program in ("vllm", "sglang") else "gguf", folder, program)
    assert f"`{program}` is not here" in caught.value.message and caught.value.hint is not None


def test_a_file_for_what_it_prints(tmp_path: Path) -> None:
    [own] = served("folder", folder_of(tmp_path / "hf"), "vllm", logs=str(tmp_path / "logs"))
    assert isinstance(own.engine, ChildEngine) and own.engine.log == tmp_path / "logs/support.log"
