"""What the demo ships: data that its generator makes, recipes that load and train, a base model of the stated kind."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from tunedock.pipeline import resolve_recipe
from tunedock.recipe.load import load

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_make_data", DEMO / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_is_what_the_generator_makes(make_data: ModuleType) -> None:
    rows = lines("triage.jsonl")
    assert rows == [make_data.row(made) for made in islice(make_data.tickets(7), len(rows))]


def test_the_pairs_are_what_the_generator_makes(make_data: ModuleType) -> None:
    """One field apart, right and wrong, on messages the task's data does not have."""
    rows, messages = lines("preferences.jsonl"), {row["messages"][1]["content"] for row in lines("triage.jsonl")}
    assert rows == list(make_data.pairs(9, len(rows), messages))
    for row in rows:
        chosen, rejected = json.loads(row["chosen"]), json.loads(row["rejected"])
        assert sum(chosen[key] != rejected[key] for key in chosen) == 1
        assert row["prompt"][1]["content"] not in messages


def test_each_message_stands_once_and_holds_its_answer() -> None:
    rows = lines("triage.jsonl")
    messages = [row["messages"][1]["content"] for row in rows]
    assert len(set(messages)) == len(messages) == 2600
    for row, message in zip(rows, messages, strict=True):
        answer = json.loads(row["messages"][2]["content"])
        assert list(answer) == ["team", "product", "urgent"]
        assert re.search(r"\d{4}", message)  # the order's number, and often others: what is not asked for
    assert 0.4 < sum(message.isascii() for message in messages) / len(messages) < 0.6


def test_the_corpus_holds_no_message_of_the_task_and_no_answer(make_data: ModuleType) -> None:
    rows = lines("triage.jsonl")
    messages = {row["messages"][1]["content"] for row in rows}
    documents = list(make_data.corpus(8, 5000, messages))
    assert not messages & {line for text in documents for line in text.splitlines()}
    assert not any(row["messages"][2]["content"] in text for row in rows[:200] for text in documents)
    assert documents[:400] == [row["text"] for row in lines("shop.jsonl")]


def test_the_base_is_small_and_its_tokenizer_keeps_every_character() -> None:
    files = [path for path in (DEMO / "base").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 7_000_000
    with safe_open(DEMO / "base" / "model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    for text in ("Order #40718, s'il vous plaît!\n\tOK", "烧水壶坏了，订单号是2093。😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("2093")["input_ids"]) == ["20", "93"]


@pytest.mark.parametrize("path", [*RECIPES, DEMO / "recipe.yaml"], ids=lambda path: path.name)
def test_recipes_resolve(path: Path) -> None:
    assert resolve_recipe([path]).recipe.offline


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_recipe_of_the_readme_is_one(name: str, tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    path = tmp_path / "support.yaml"
    path.write_text(block[1], encoding="utf-8")
    assert load([path], []).recipe.data.split.seed == 42


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_train(path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tunedock", "train", str(path), f"train.output_dir={run}", "train.max_steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
