"""A DPO run as people make it: it learns, resumes to the last bit, and every command takes it."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny, tiny_model
from pairs import pairs
from tunedock import pipeline
from tunedock.data.layout import step_indices
from tunedock.data.sample import Sample
from tunedock.errors import DataError
from tunedock.eval import held_out, inspect_data
from tunedock.eval.stage import evaluate
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.model.adapter import attach
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference
from tunedock.objective.dpo import Dpo
from tunedock.recipe.adapters import Adapter, Freeze, Full, Lora
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe, Train
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.feed import FixedFeed
from tunedock.train.loop import Loop
from tunedock.train.memory import HostMemory
from tunedock.train.optimizer import make_updater
from tunedock.train.progress import Course
from tunedock.train.stage import train

CPU = torch.device("cpu")
BATCH, PER_EPOCH = 3, 3
ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(r=4, alpha=8, dropout=0.1),
    "full": Full(),
    "freeze": Freeze(last_n_layers=1),
}


class MemoryFeed(FixedFeed):
    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def step(self, number: int) -> list[Sample]:
        return [self._samples[i] for i in step_indices(len(self._samples), BATCH, number, seed=5)]

    def state(self, number: int) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        pass


def build(folder: Path, adapter: Adapter, *, limit: int = 100) -> tuple[Loop, Policy, io.StringIO]:
    """Eight steps over nine pairs: the third epoch is on its way at the end. Rows part some pairs."""
    folder.mkdir(exist_ok=True)
    settings = Train(learning_rate=5e-3, save_steps=2, eval_strategy="steps", eval_steps=4, save_total_limit=None)
    torch.manual_seed(settings.seed)
    policy = Policy(attach(tiny_model("qwen3"), adapter, seed=3), CPU, Precision(torch.float32, torch.float32))
    samples = pairs(13, policy.config.vocab_size)
    stream = io.StringIO()
    loop = Loop(
        policy=policy,
        objective=Dpo(beta=0.5),
        reference=Reference.of(policy, limit=limit),
        feed=MemoryFeed(samples[:9]),
        validation=samples[9:],
        layout=policy.rows,
        budget=Budget(memory=HostMemory(), plan=None, most=4096, pinned=40),
        updater=make_updater(policy.trainable, settings, total_steps=8, device=CPU),
        checkpoints=Checkpoints(folder, keep=None),
        course=Course(8, PER_EPOCH, 8 * BATCH),
        train=settings,
        emit=Emitter(stream),
        stop_requested=lambda: False,
    )
    return loop, policy, stream


def metrics(stream: io.StringIO) -> list[dict[str, float]]:
    """What each step and evaluation measured, without what a clock measured."""
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    kept = ("loss", "rewards", "logps", "eval_loss", "eval_rewards", "eval_pairs", "grad_norm")
    return [
        {"step": e["step"], **{name: value for name, value in e["values"].items() if name.startswith(kept)}}
        for e in events
        if e["kind"] == "metrics"
    ]


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        pytest.param(kind, limit, marks=() if (kind, limit) in (("lora", 100), ("full", 4)) else pytest.mark.long)
        for kind in ADAPTERS
        for limit in (100, 4)
    ],
)
def test_resuming_is_bit_identical(tmp_path: Path, kind: str, limit: int) -> None:
    """In the second epoch, where the reference's figures come from the first; all of them remembered, or only some."""
    straight, policy, stream = build(tmp_path / "a", ADAPTERS[kind], limit=limit)
    straight.run()
    build(tmp_path / "b", ADAPTERS[kind], limit=limit)[0].run()
    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(tmp_path / "b" / name)
    resumed, again, stream_again = build(tmp_path / "b", ADAPTERS[kind], limit=limit)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    assert resumed.progress.step == 4
    assert resumed.state.reference is not None and resumed.state.reference.remembered == min(limit, 13)
    resumed.run()
    told = [entry for entry in metrics(stream) if entry["step"] > 4]
    assert told == metrics(stream_again)
    assert {entry["step"] for entry in told} == {5, 6, 7, 8}
    for (name, one), (_, other) in zip(policy.trainable, again.trainable, strict=True):
        assert torch.equal(one, other), name
    assert metrics(stream)[0]["loss"] == pytest.approx(math.log(2))
    evaluations = [entry for entry in metrics(stream) if "eval_loss" in entry]
    assert [entry["eval_pairs"] for entry in evaluations] == [4, 4]
    assert all("eval_rewards/accuracies" in entry for entry in evaluations)


ROWS = [
    {
        "prompt": f"How many hours are in {n} days?",
        "chosen": f"There are {24 * n} hours.",
        "rejected": "I do not know, it is a long time." * (1 + n % 2),
    }
    for n in range(1, 41)
]


def workplace(folder: Path) -> Path:
    if not (folder / "base").exists():
        save_tiny("qwen3", folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "recipe.yaml").write_text(
        "model: ./base\nobjective: dpo\ndata: {train: rows.jsonl, max_length: 128, cache_dir: ./cache}\n"
        "train: {num_train_epochs: 2, batch_size: 8, learning_rate: 5.0e-3, bf16: false, token_budget: 256, report_to: none}\n"
        "eval: {max_new_tokens: 4, max_samples: 2}\n"
    )
    return folder / "recipe.yaml"


def run_of(folder: Path, name: str, *overrides: str) -> tuple[Run, Recipe]:
    recipe = workplace(folder)
    resolved = pipeline.resolve_recipe([recipe], [*overrides, f"train.output_dir={folder / name}"])
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("lora", ["adapter=lora"], "adapter switched off"),
        pytest.param("full", ["adapter=full"], "a copy of what is trained", marks=pytest.mark.long),
        ("nf4", ["adapter=lora", "quantize=nf4"], "base in nf4: 14 linear layers"),
        *(
            pytest.param(
                kind, ["adapter=lora", f"quantize={kind}"], f"base in {kind}: 14 linear layers", marks=pytest.mark.long
            )
            for kind in ("fp8", "int8")
        ),
    ],
)
def test_a_run_from_data_to_export(
    place: Path, name: str, settings: list[str], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = run_of(place, name, *settings)
    steps = [e["values"] for e in events(run, "metrics") if "loss" in e["values"]]
    rounding = 1e-3 if name == "int8" else 1e-6  # a last digit of a state, and it rounds to another of 255 steps
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=rounding)
    assert steps[-1]["loss"] < 0.5 and steps[-1]["rewards/accuracies"] > 0.8
    evaluated = [e["values"] for e in events(run, "metrics") if "eval_loss" in e["values"]]
    assert evaluated[-1]["eval_rewards/margins"] > 0 and evaluated[-1]["eval_pairs"] > 0
    assert any(kept in e["message"] for e in events(run, "note"))
    assert run.state().objective == "dpo"
    layouts: list[str] = []
    ask = held_out.measure
    monkeypatch.setattr(
        held_out, "measure", lambda policy, *rest, **more: layouts.append(policy.layout) or ask(policy, *rest, **more)
    )  # type: ignore[func-returns-value]
    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert layouts == ["tree"]  # of the base, which prefers nothing to itself, nothing is measured
    assert found["tuned"]["loss"] == pytest.approx(evaluated[-1]["eval_loss"], rel=max(1e-4, 10 * rounding))
    assert found["tuned"]["pairs"] == evaluated[-1]["eval_pairs"]
    assert "loss" not in found["base"] and "exact_match" in found["base"]
    assert found["answers"][0]["reference"].startswith("There are")
    assert "Preferred as labelled" in (run.path / "eval" / "answers.html").read_text()
    made = export(run, recipe, Emitter(None), order=Order(to=str(place / f"export-{name}"), format="hf"))
    assert made["checks"]["changed_tensors"] > 0
    assert "dpo" in (place / f"export-{name}" / "README.md").read_text()


def test_asked_before_gives_the_same_run(place: Path, tmp_path: Path) -> None:
    """Rows of other samples beside a pair change its last digits and nothing more."""
    curves = []
    for name, value in (("asked", "true"), ("as-it-goes", "false")):
        setting = f"objective.precompute_ref_log_probs={value}"
        run, _ = run_of(place, name, "adapter=full", setting, "train.learning_rate=1e-3")
        curves.append([e["values"]["loss"] for e in events(run, "metrics") if "loss" in e["values"]])
        assert any("before the first step" in e["message"] for e in events(run, "note")) == (value == "true")
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_run_asked_before_resumes_without_asking_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipe = run_of(
        place, "resumed", "adapter=full", "objective.precompute_ref_log_probs=true", "train.save_steps=5"
    )
    expected = [e["values"]["loss"] for e in events(run, "metrics") if "loss" in e["values"]]
    last = Checkpoints(run.checkpoints, keep=None).index().last
    assert last is not None
    shutil.rmtree(run.checkpoints / last)
    run.events.unlink()
    monkeypatch.setattr(Reference, "_compute", lambda *_: pytest.fail("asked again"))
    train(run, recipe, Emitter.to_file(run.events), resume=True, stop=StopRequest())
    got = [e["values"]["loss"] for e in events(run, "metrics") if "loss" in e["values"]]
    assert 0 < len(got) < len(expected) and got == expected[-len(got) :]


def test_data_commands_take_it(place: Path) -> None:
    resolved = pipeline.resolve_recipe([workplace(place)], [])
    stream = io.StringIO()
    account = inspect_data.check(resolved.recipe, Emitter(stream), to=None)
    assert (account.kept, account.dropped) == (40, 0)
    shown = inspect_data.show(resolved.recipe, row="0")
    answers = ["".join(t["text"] for t in leaf["tokens"] if t["weight"] > 0) for leaf in shown["leaves"]]
    assert answers[0].startswith("There are 24 hours.") and answers[1].startswith("I do not know")


def test_rows_and_objective_must_fit(place: Path, tmp_path: Path) -> None:
    """Each names the other objective that would take the rows."""
    workplace(place)
    (place / "talk.jsonl").write_text("\n".join(json.dumps({"prompt": "Hi", "response": str(n)}) for n in range(20)))
    for overrides, words in (
        (["objective=sft"], ["`objective: sft` needs conversations", "`preference`", "set `objective: dpo`"]),
        (["data.train=talk.jsonl"], ["`objective: dpo` needs preferences", "set `objective: sft`"]),
    ):
        given = [text.replace("talk.jsonl", str(place / "talk.jsonl")) for text in overrides]
        resolved = pipeline.resolve_recipe([place / "recipe.yaml"], given)
        with pytest.raises(DataError) as caught:
            inspect_data.check(resolved.recipe, Emitter(None), to=None)
        for word in words:
            assert word in str(caught.value)
