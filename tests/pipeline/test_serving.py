"""What a command line names, as a gateway is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import RecipeError, RunError
from tunedock.pipeline.serving import order_of
from tunedock.recipe.serving import Start
from tunedock.run.record import Run, RunState


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, an exported folder, a GGUF file, and a folder with something else."""
    state = RunState("triage", 0.0, "sft", "m", "lora", "0")
    Run.create(tmp_path / "runs/triage", recipe_yaml="", resolved={}, state=state)
    for name in ("hf/config.json", "gguf/model-f16.gguf", "other/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def order(*given: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "adapters": {}, "engine": None, "engine_model": None, "key_env": None, "runs_dir": Path("runs"), "fields": {},
    }  # fmt: skip
    return order_of(given, **{**settings, **changes})


def test_each_kind_by_what_it_is(place: Path) -> None:
    made = order(
        "triage", "./hf", "small=gguf", "gguf/model-f16.gguf", "big=vllm+http://gpu:8000/v1/", "https://api.example/v1"
    )
    assert [(one.name, one.kind, one.place) for one in made.backends] == [
        ("triage", "run", f"{place}/runs/triage"),
        ("hf", "folder", f"{place}/hf"),
        ("small", "gguf", f"{place}/gguf"),
        ("model-f16", "gguf", f"{place}/gguf/model-f16.gguf"),
        ("big", "vllm", "http://gpu:8000/v1"),
        ("api.example", "openai", "https://api.example/v1"),
    ]
    assert (made.host, made.port, made.open) == ("127.0.0.1", 8000, False)


def test_a_version_is_called_as_its_model_or_by_what_it_is(place: Path) -> None:
    made = order("models:/support@production", "models:/support@staging", "models:/support/3", "old=models:/support/2")
    assert [(one.name, one.kind) for one in made.backends] == [
        ("support", "version"), ("support@staging", "version"), ("support@v3", "version"), ("old", "version"),
    ]  # fmt: skip
    assert order("models:/support/3", fields={"dtype": "float32"}).dtype == "float32"


def test_what_is_at_an_address(place: Path) -> None:
    made = order("big=http://gpu:8000/v1", "llama-server+http://cpu/v1", engine="vllm")
    assert [(one.name, one.kind, one.start) for one in made.backends] == [
        ("big", "vllm", None),
        ("cpu", "llama-server", None),
    ]


def test_a_program_for_what_is_here(place: Path) -> None:
    start = {"tensor_parallel_size": 4, "arguments": ["--enforce-eager"]}
    made = order("triage", "./hf", "big=sglang+http://gpu/v1", engine="vllm", start=start)
    first, second, third = made.backends
    assert first.kind == "run" and first.start == second.start == Start(program="vllm", **start)
    assert (third.kind, third.start) == ("sglang", None)


@pytest.mark.parametrize(
    ("given", "changes", "says"),
    [
        (["triage", "http://gpu/v1"], {"engine": "vllm"}, "vllm+http://host:port/v1"),
        (["triage"], {"engine": "openai"}, "engines that can be started are vllm, sglang"),
        (["models:/support@production"], {"engine": "vllm"}, "computed in this process"),
        (["triage"], {"start": {"arguments": ["--x"]}}, "for an engine that is started here"),
        (["http://gpu/v1"], {"engine": "vllm", "start": {"tensor_parallel_size": 2}}, "tensor_parallel_size"),
    ],
)
def test_an_engine_that_cannot_be_meant(place: Path, given: list[str], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        order(*given, **changes)
    assert says in str(caught.value)


def test_adapters_sit_on_the_first(place: Path) -> None:
    made = order("./hf", "triage", adapters={"fr": "/adapters/fr"})
    assert [one.adapters for one in made.backends] == [{"fr": "/adapters/fr"}, {}]
    with pytest.raises(RecipeError, match="computed here"):
        order("http://gpu:8000/v1", adapters={"fr": "/adapters/fr"})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("./other", "this folder holds no model"),
        ("http://user:secret@gpu/v1", "is no address of a server"),
        ("ftp://gpu/v1", "is no address of a server"),
        ("http://gpu/v1?key=secret", "is no address of a server"),
        ("a\tb=./hf", "should match pattern"),
    ],
)
def test_what_is_refused(place: Path, given: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        order(given)
    assert says in str(caught.value)


def test_no_run_by_that_name(place: Path) -> None:
    with pytest.raises(RunError):
        order("nothing")
    with pytest.raises(RunError, match="there is no such file or folder"):
        order("small=exports/none.gguf")
    with pytest.raises(RecipeError, match=r"`chat\.example` is no origin"):
        order("triage", fields={"cors_origins": ["https://a.example", "chat.example"]})
    with pytest.raises(RecipeError, match="without its certificate"):
        order("triage", fields={"tls_key": "key.pem"})
    with pytest.raises(RecipeError, match="nothing here is computed by PyTorch"):
        order("http://gpu/v1", fields={"dtype": "float32"})
    assert order("triage", fields={"dtype": "float32"}).dtype == "float32"
