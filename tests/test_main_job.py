"""The main job on data in the three shapes people have: check, train a LoRA, stop, resume, evaluate, talk, export, delete.

What is stopped in its middle trains in a real process that gets a real SIGINT; the rest runs inline where that changes nothing but
the time (`inline_worker`). The quick tests take some 60 rows, the long ones thousands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import save_tiny
from inline_worker import InlineLauncher
from tunedock.cli.app import main
from tunedock.events import EventReader
from tunedock.run.record import Run

QUICK_ROWS, LONG_ROWS = 60, 3000

RECIPE = """\
model: ./base
adapter: {{kind: lora, r: 4, dropout: 0.1}}      # dropout: its random numbers must go on where they stopped
offline: true
data: {{train: ./{file}, max_length: 256, cache_dir: ./cache}}
train:
  max_steps: {steps}
  batch_size: 16
  learning_rate: 1.0e-2
  warmup_steps: 2
  bf16: false
  token_budget: 512
  save_steps: 3
  eval_strategy: steps
  report_to: none
eval: {{max_samples: 3, max_new_tokens: 8}}
"""
FORMATS = ("alpaca", "sharegpt", "messages")


def ask(i: int) -> tuple[str, str]:
    things = ("bicycle", "kettle", "lamp", "tent", "文具盒")
    thing = things[i % len(things)]
    question = f"Order {i}: the {thing} arrived late and broken, what can I do about it?"
    return question, f"Send the {thing} of order {i} back; the refund of {i % 90 + 10} comes within {i % 9 + 1} days."


def row(kind: str, i: int) -> dict[str, Any]:
    question, answer = ask(i)
    if kind == "alpaca":
        return {"instruction": "Answer the customer.", "input": question, "output": answer}
    if kind == "sharegpt":
        turns = [("human", "Hello?"), ("gpt", "How can I help?"), ("human", question), ("gpt", answer)]
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}
    turns = [("system", "You help customers."), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": who, "content": text} for who, text in turns]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    save_tiny("qwen3", folder / "base")
    for kind in FORMATS:
        for count in (QUICK_ROWS, LONG_ROWS):
            made = [row(kind, i) for i in range(count)]
            name = f"{kind}-{count}"
            if kind == "alpaca":  # as it is published: one array in a .json file
                file, text = f"{name}.json", json.dumps(made, ensure_ascii=False, indent=1)
            else:
                file, text = f"{name}.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made)
            (folder / file).write_text(text, encoding="utf-8")
            steps = 8 if count == QUICK_ROWS else 60
            (folder / f"{name}.yaml").write_text(RECIPE.format(file=file, steps=steps))
    return folder


@pytest.fixture
def tunedock(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Runs a command that must succeed, its worker inline and with one thread as the real ones; returns its `--json`."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        torch.set_num_threads(1)
        try:
            with pytest.raises(SystemExit) as ended:
                main([*arguments, "--json"])
        finally:
            torch.set_num_threads(threads)
        written = capsys.readouterr()
        assert not ended.value.code, written.out + written.err
        value: dict[str, Any] = json.loads(written.out)
        return value

    return run


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tunedock", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def process(folder: Path, *arguments: str, **options: Any) -> str:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=280, **options
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def interrupted(folder: Path, recipe: str, name: str, *arguments: str) -> Run:
    """Trains in a real process and sends it SIGINT after its first step; a run that is stopped in its middle."""
    run = Run(folder / "runs" / name)
    with subprocess.Popen(
        command("train", recipe, f"train.output_dir=runs/{name}", *arguments),
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        deadline = time.monotonic() + 120
        while not losses(run):
            assert time.monotonic() < deadline
            assert started.poll() is None, started.communicate()[1]
            time.sleep(0.002)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=120)
    assert started.returncode == 130, err
    assert "saving a checkpoint" in err
    assert f"hint: go on with `tunedock train --resume {run.path}`" in err
    assert "Traceback" not in err
    assert run.state().status == "interrupted"
    assert not run.model.exists()
    return run


def losses(run: Run) -> dict[int, float]:
    told = (event for event in EventReader(run.events).new() if event["kind"] == "metrics")
    return {event["step"]: event["values"]["loss"] for event in told if "loss" in event["values"]}  # type: ignore[misc]


def assert_same_result(one: Run, other: Run) -> None:
    """Bit for bit: the weights, and the loss of every step."""
    assert losses(one) == losses(other)
    ours, theirs = (load_file(run.model / "adapter_model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(bool(tensor.any()) for name, tensor in ours.items() if "lora_B" in name)  # and something was learnt


def assert_export_is_the_run(folder: Path, run: Run, exported: Path, text: str) -> None:
    """transformers loads the export, and its logits are those of base plus adapter, put together by PEFT alone."""
    ids = AutoTokenizer.from_pretrained(exported)(text, return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        untrained = base(ids).logits
        tuned = PeftModel.from_pretrained(base, run.model).eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-4)
    assert float((tuned - untrained).abs().max()) > 0.05


def job(folder: Path, tunedock: Callable[..., dict[str, Any]], kind: str, count: int) -> tuple[Run, Run]:
    """Check, train without a break, train with one, resume. Returns (whole, stopped)."""
    recipe, name = f"{kind}-{count}.yaml", f"{kind}-{count}"
    checked = tunedock("data", "check", recipe)
    assert (checked["read"], checked["kept"], checked["dropped"]) == (count, count, 0)
    assert list(checked["account"]["formats"].values()) == [kind]
    held_out = count // 10
    assert {side: value["samples"] for side, value in checked["splits"].items()} == {
        "train": count - 2 * held_out,
        "validation": held_out,
        "test": held_out,
    }
    trained = tunedock("train", recipe, f"train.output_dir=runs/{name}-whole")
    whole = Run(folder / "runs" / f"{name}-whole")
    stopped = interrupted(folder, recipe, f"{name}-stopped")
    assert 0 < max(losses(stopped)) < trained["steps"]
    resumed = tunedock("train", "--resume", stopped.name)
    assert resumed["steps"] == trained["steps"] == max(losses(stopped))
    assert resumed["eval_loss"] == trained["eval_loss"]
    assert stopped.state().status == "finished"
    assert_same_result(whole, stopped)
    return whole, stopped


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["alpaca", *(pytest.param(kind, marks=pytest.mark.long) for kind in FORMATS[1:])])
def test_stopped_and_resumed_gives_the_same_weights(workplace, tunedock, kind):
    _, run = job(workplace, tunedock, kind, QUICK_ROWS)
    assert {path.name for path in (run.path / "plots").iterdir()} == {"loss.svg", "loss.png"}
    values = tunedock("eval", run.name)
    assert values["tuned"]["loss"] < values["base"]["loss"]
    assert (values["samples"], values["questions"]) == (6, 3)
    assert json.loads((run.path / "eval" / "metrics.json").read_text())["tuned"] == values["tuned"]
    page = (run.path / "eval" / "answers.html").read_text(encoding="utf-8")
    assert values["answers"][0]["reference"] in page
    out = workplace / "out" / kind
    checks = tunedock("export", run.name, "--to", str(out))["checks"]
    assert checks["changed_tensors"] > 0
    assert_export_is_the_run(workplace, run, out, ask(7)[0])
    tunedock("export", run.name, "--to", f"{out}-adapter", "--format", "adapter")
    assert (
        load_file(f"{out}-adapter/adapter_model.safetensors").keys()
        == load_file(run.model / "adapter_model.safetensors").keys()
    )
    base = AutoModelForCausalLM.from_pretrained(workplace / "base", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, f"{out}-adapter").peft_config["default"].r == 4


@pytest.mark.parametrize("kind", FORMATS)
def test_every_shape_is_read_whole(tunedock, kind):
    checked = tunedock("data", "check", f"{kind}-{QUICK_ROWS}.yaml")
    assert (checked["read"], checked["kept"], checked["dropped"]) == (QUICK_ROWS, QUICK_ROWS, 0)
    assert list(checked["account"]["formats"].values()) == [kind]


def test_a_run_is_talked_to_compared_and_deleted(workplace, tunedock):
    recipe, runs = f"messages-{QUICK_ROWS}.yaml", ("--runs-dir", "own")
    short = ("train.max_steps=2", "train.warmup_steps=0")
    made = process(workplace, "train", recipe, "train.output_dir=own/first", *short, "--json")
    assert json.loads(made)["steps"] == 2
    tunedock("train", recipe, "train.output_dir=own/second", "train.learning_rate=1e-3", *short)
    answers = process(workplace, "chat", "first", *runs, input="Where is my lamp?\n/base\nHello?\n")
    assert len(answers.splitlines()) >= 2
    listed = tunedock("runs", "list", *runs)
    assert [(run["name"], run["status"], run["steps"]) for run in listed] == [
        ("second", "finished", 2),
        ("first", "finished", 2),
    ]
    shown = tunedock("runs", "show", "first", *runs)
    assert (shown["status"], shown["adapter"], shown["metrics"]["step"]) == ("finished", "lora", 2)
    compared = tunedock("runs", "compare", "first", "second", *runs)
    assert compared["recipe"]["train.learning_rate"] == [0.01, 0.001]
    assert set(compared["recipe"]) == {"train.learning_rate", "train.output_dir"}
    assert len(compared["metrics"]["loss"]) == 2
    assert tunedock("runs", "delete", "first", *runs, "--yes") == {"deleted": str(workplace / "own" / "first")}
    assert [path.name for path in (workplace / "own").iterdir()] == ["second"]


@pytest.mark.parametrize("buffer", [7, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_stream_stopped_and_resumed_gives_the_same_weights(workplace, tunedock, buffer):
    recipe, name = f"sharegpt-{QUICK_ROWS}.yaml", f"stream-{buffer}"
    streaming = ("data.streaming=true", f"data.shuffle_buffer={buffer}")
    trained = tunedock("train", recipe, f"train.output_dir=runs/{name}-whole", *streaming)
    stopped = interrupted(workplace, recipe, f"{name}-stopped", *streaming)
    assert 0 < max(losses(stopped)) < trained["steps"]
    assert tunedock("train", "--resume", stopped.name)["steps"] == trained["steps"]
    assert_same_result(Run(workplace / "runs" / f"{name}-whole"), stopped)


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMATS)
def test_the_whole_job_on_thousands_of_rows(workplace, tunedock, kind):
    _, run = job(workplace, tunedock, kind, LONG_ROWS)
    curve = losses(run)
    # A small LoRA on random frozen weights learns little, but it learns: about a tenth.
    assert sum(curve[step] for step in range(51, 61)) < 0.95 * sum(curve[step] for step in range(1, 11))
    values = tunedock("eval", run.name)
    assert values["tuned"]["loss"] < 0.9 * values["base"]["loss"]
    assert process(workplace, "chat", run.name, input="Where is my lamp?\n").strip()
    out = workplace / "out" / f"{kind}-long"
    tunedock("export", run.name, "--to", str(out))
    assert_export_is_the_run(workplace, run, out, ask(7)[0])
