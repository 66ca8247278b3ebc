"""How engines are started: golden command lines of each kind, and what must hold of every one of them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.recipe.serving import EngineContainer, Program
from tunedock.serve.engines.commands import FACTS, EngineModel, Wishes, command, contained, parsers

GOLDEN = Path(__file__).parents[2] / "golden" / "engines"
KEY = "a-key-of-chance"
QWEN = "{% if tools %}<tool_call>{% endif %}{% if enable_thinking %}<think></think>{% endif %}"
TUNED = EngineModel(
    "/models/base", "support", tokenizer="/runs/support/model", template=QWEN,
    adapters={"support": "/runs/support/model", "fr": "/adapters/fr"}, rank=24, quantization="bitsandbytes",
)  # fmt: skip
MERGED = EngineModel("/exports/support", "support", template=QWEN, thinking=True)
HUB = EngineModel(
    "Qwen/Qwen3-8B", "support", revision="9c925d64d72725edaf899c6cb9c377fd0709d9c5", trust_remote_code=True
)
FILE = EngineModel("/exports/support/model.gguf", "support", template=QWEN)
MANY = Wishes(longest=8192, running=64, tensor_parallel_size=4)
GIVEN = replace(MANY, arguments=("--enforce-eager", "--kv-cache-dtype=fp8"))

CASES: dict[str, tuple[Program, EngineModel, Wishes]] = {
    "vllm-adapters": ("vllm", TUNED, GIVEN),
    "vllm-merged": ("vllm", MERGED, Wishes()),
    "vllm-hub": ("vllm", HUB, Wishes(tensor_parallel_size=2)),
    "sglang-adapters": ("sglang", TUNED, replace(MANY, arguments=("--disable-cuda-graph",))),
    "sglang-merged": ("sglang", MERGED, Wishes()),
    "llama-server": ("llama-server", FILE, replace(MANY, tensor_parallel_size=None, arguments=("--n-gpu-layers=99", "--mlock"))),
    "llama-server-plain": ("llama-server", replace(FILE, template=None), Wishes()),
    "ollama": ("ollama", replace(FILE, name="served", modelfile="/exports/support/Modelfile"), Wishes(longest=4096, running=2)),
    "ollama-weights": ("ollama", replace(FILE, name="served"), Wishes()),
    "tunedock": ("tunedock", replace(MERGED, adapters={"fr": "/adapters/fr"}), Wishes(longest=512, running=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_command_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    kind, model, wishes = CASES[name]
    found = json.loads(json.dumps(asdict(command(kind, model, wishes, KEY))))
    found["arguments"] = ["python" if part == sys.executable else part for part in found["arguments"]]
    text = json.dumps(found, indent=2) + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text)
    assert text == file.read_text(), "python -m pytest --rewrite-golden writes it anew; say why in the commit"


INSIDE = replace(MANY, host="0.0.0.0")
BOX = EngineContainer(image="vllm/vllm-openai:v0.33.0", gpus=["0", "1"], launcher=["python", "-m", "launcher"])


@pytest.mark.parametrize("name", ["container-vllm-adapters", "container-sglang-hub"])
def test_the_command_of_a_container_is_as_in_its_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    made = command("vllm", TUNED, INSIDE, KEY) if "vllm" in name else command("sglang", HUB, INSIDE, KEY)
    text = json.dumps(asdict(contained(made, TUNED if "vllm" in name else HUB, BOX)), indent=2) + "\n"
    file = GOLDEN / f"{name}.json"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text)
    assert text == file.read_text(), "python -m pytest --rewrite-golden writes it anew; say why in the commit"


def test_ollama_is_not_put_into_a_container() -> None:
    with pytest.raises(RecipeError, match="not started in a container"):
        contained(command("ollama", FILE, INSIDE, KEY), FILE, BOX)


def test_there_is_no_golden_file_too_many() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == {*CASES, "container-vllm-adapters", "container-sglang-hub"}


paths = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).map(lambda text: f"/m/{text}")
names = st.from_regex(r"[A-Za-z0-9][\w.:-]{0,20}", fullmatch=True)
models = st.builds(
    EngineModel, path=paths, name=names, tokenizer=st.none() | paths, template=st.none() | st.text(max_size=30) | st.just(QWEN),
    thinking=st.booleans(), adapters=st.dictionaries(names, paths, max_size=3), rank=st.integers(0, 512),
)  # fmt: skip
wishes = st.builds(
    Wishes, longest=st.none() | st.integers(1, 1 << 20), running=st.none() | st.integers(1, 512),
    tensor_parallel_size=st.none() | st.integers(1, 8),
)  # fmt: skip


@given(kind=st.sampled_from(get_args(Program)), model=models, asked=wishes, value=paths)
def test_of_every_command(kind: Program, model: EngineModel, asked: Wishes, value: str) -> None:
    """The key is in no argument; it listens on loopback; paths stand whole, whatever is in them; what was given comes last."""
    key = "k" * 43
    asked = asked if kind == "ollama" else replace(asked, arguments=(f"--own-flag={value}",))
    made = command(kind, model, asked, key)
    assert not any(key in part for arguments in (made.arguments, *made.then) for part in arguments)
    told = {**made.environment, **made.files}
    assert (kind == "ollama") != any(key in text for text in told.values())
    if kind == "ollama":
        assert made.environment["OLLAMA_HOST"] == "127.0.0.1:{port}"
        return
    assert made.arguments[made.arguments.index("--host") + 1] == "127.0.0.1"
    assert made.arguments[made.arguments.index("--port") + 1] == "{port}"
    assert any(model.path in (part, part.partition("=")[2]) for part in made.arguments)
    assert made.arguments[-1 if kind != "llama-server" else -2 :][0].startswith("--own-flag")
    if kind != "llama-server":
        for name, path in model.adapters.items():
            assert f"{name}={path}" in made.arguments


@given(kind=st.sampled_from(("vllm", "sglang")), cut=st.integers(1, 20), dashes=st.booleans())
def test_what_is_the_gateways_is_refused_in_any_spelling(kind: Program, cut: int, dashes: bool) -> None:
    flag = "--served-model-name"[: 2 + cut]
    with pytest.raises(RecipeError, match="gateway's to say"):
        command(kind, MERGED, Wishes(arguments=((flag if dashes else "--" + flag[2:].replace("-", "_")) + "=x",)), KEY)


@pytest.mark.parametrize(
    ("kind", "argument", "says"),
    [
        ("vllm", "--host=0.0.0.0", "`--host` of the engine is the gateway's"),
        ("vllm", "--api_key=x", "`--api-key` of the engine is the gateway's"),
        ("vllm", "--uds=/tmp/x", "`--uds` of the engine is the gateway's"),
        ("sglang", "--admin-api-key=x", "`--admin-api-key` of the engine is the gateway's"),
        ("llama-server", "-m=/other.gguf", "`-m` of the engine is the gateway's"),
        ("llama-server", "--api-key=x", "`--api-key` of the engine is the gateway's"),
        ("tunedock", "--open", "`--open` of the engine is the gateway's"),
        ("vllm", "max num seqs", "is a flag and its value"),
        ("vllm", "--", "is a flag and its value"),
        ("vllm", "--max num=4", "is a flag and its value"),
        ("ollama", "--verbose", "takes no arguments"),
    ],
)  # fmt: skip
def test_what_an_engine_is_not_to_be_told(kind: Program, argument: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        command(kind, MERGED, Wishes(arguments=(argument,)), KEY)
    assert says in caught.value.message and caught.value.where == f"--engine-arg {argument}"


@pytest.mark.parametrize(
    ("template", "vllm", "sglang"),
    [
        (QWEN, ("hermes", "qwen3"), ("qwen25", "qwen3")),
        ("<tool_call><function=", ("qwen3_coder", None), ("qwen3_coder", None)),
        ("[TOOL_CALLS]", ("mistral", None), ("mistral", None)),
        ("{{ message }}</think>", (None, "deepseek_r1"), (None, "deepseek-r1")),
        ("plain", (None, None), (None, None)),
        (None, (None, None), (None, None)),
    ],
)
def test_parsers_by_what_a_template_writes(
    template: str | None, vllm: tuple[str | None, str | None], sglang: tuple[str | None, str | None]
) -> None:
    assert parsers(template, "vllm") == vllm
    assert parsers(template, "sglang") == sglang


def test_the_facts_are_whole() -> None:
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    for row in [*facts["calls"], *facts["reasoning"]]:
        assert row["texts"] and all(row["texts"]) and row["vllm"] and row["sglang"]


def test_a_rank_that_vllm_knows() -> None:
    arguments = command("vllm", TUNED, Wishes(), KEY).arguments
    assert arguments[arguments.index("--max-lora-rank") + 1] == "32"
