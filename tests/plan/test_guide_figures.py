"""What the guides say `tunedock plan` says, in both languages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunedock import pipeline
from tunedock.cli.app import app
from tunedock.plan.cards import card
from tunedock.plan.memory import readable
from tunedock.plan.spread import WHOLE

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
RECIPE = ROOT / "recipes" / "models" / "qwen3-8b-lora.yaml"
METHODS = [
    ["adapter=full"],
    ["adapter=full", "train.optim=adamw_8bit"],
    ["adapter={kind: freeze, last_n_layers: 2}"],
    ["adapter={kind: lora, r: 16}"],
    ["quantize=fp8"],
    ["quantize=nf4"],
]
"""As the rows of the table in the guide."""


@pytest.mark.parametrize("page", ["choosing-a-method.md", "choosing-a-method.zh.md"])
def test_what_each_method_needs(page: str) -> None:
    text = (GUIDES / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| ([\d,]+) \| ([\d.]+ GiB) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == len(METHODS)
    for changes, (trained, memory, large, small) in zip(METHODS, rows, strict=True):
        for name, told in (("4090", large), ("4080", small)):
            found = pipeline.plan([RECIPE], changes, target=card(name, 1), spread=WHOLE, rows=1000)
            assert (f"{found.trained:,}", readable(found.need.at(2048))) == (trained, memory), changes
            assert found.fits is (told in ("yes", "可以")), changes


@pytest.mark.parametrize("page", ["memory.md", "memory.zh.md"])
def test_what_the_command_prints(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (GUIDES / page).read_text(encoding="utf-8")
    shown = re.findall(r"^\$ tunedock (plan .*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    assert len(shown) == 3
    for line, told in shown:
        printed = CliRunner().invoke(app, [*shlex.split(line), "--rows", "1000"]).stdout
        lines = [line.rstrip() for line in printed.splitlines()]
        for wanted in told.splitlines():
            assert wanted == "..." or wanted in lines, wanted


@pytest.mark.parametrize("page", ["memory.md", "memory.zh.md"])
def test_what_the_levers_save(page: str) -> None:
    text = (GUIDES / page).read_text(encoding="utf-8")
    told = {
        name: (before, after)
        for name, before, after in re.findall(r"^\| `(\S+?)`.*? \| ([\d.]+) \S+ ([\d.]+) GiB", text, re.M)
    }
    checkpointed, plain = {}, {}
    for into, again in ((checkpointed, "true"), (plain, "false")):
        for name, changes in {"lora": [], "full": ["adapter=full"], "fp8": ["quantize=fp8"], "nf4": ["quantize=nf4"],
                              "8bit": ["adapter=full", "train.optim=adamw_8bit"]}.items():  # fmt: skip
            changes = [*changes, f"train.gradient_checkpointing={again}"]
            found = pipeline.plan([RECIPE], changes, target=card("4090", 1), spread=WHOLE, rows=1000)
            into[name] = readable(found.need.at(2048)).removesuffix(" GiB")
    assert told == {
        "train.gradient_checkpointing=true": (plain["lora"], checkpointed["lora"]),
        "quantize=fp8": (checkpointed["lora"], checkpointed["fp8"]),
        "quantize=nf4": (checkpointed["lora"], checkpointed["nf4"]),
        "train.optim=adamw_8bit": (checkpointed["full"], checkpointed["8bit"]),
        "adapter=lora": (checkpointed["full"], checkpointed["lora"]),
    }
