"""The objectives on preferences learn from the demo's pairs: on held-out ones the chosen answer rises above the rejected."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunedock import pipeline
from tunedock.eval.held_out import held_out_rows
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.model.answers import Sampler, Sampling
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.reference import Reference
from tunedock.model.session import find_base, tuned_policy
from tunedock.objective.experience import asked_and_answered
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


def run_of(folder: Path, name: str, *overrides: str, steps: int = 40) -> tuple[Run, Recipe]:
    """So many steps of the recipe, measured on held-out pairs at the end."""
    given = [
        f"train.max_steps={steps}", "train.save_strategy=no", "train.report_to=none", "train.eval_strategy=steps",
        f"train.eval_steps={steps}", f"data.cache_dir={folder / 'cache'}", f"train.output_dir={folder / name}", *overrides,
    ]  # fmt: skip
    resolved = pipeline.resolve_recipe([ROOT / "recipes" / f"{name}-lora.yaml"], given)
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


def values(run: Run) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [e["values"] for e in events if e["kind"] == "metrics"]


@pytest.mark.parametrize(
    ("name", "figure", "least"),
    [
        ("kto", "eval_rewards/margins", 0.3),  # in units of beta times a log-ratio; 0 where it starts
        ("orpo", "eval_log_odds_chosen", 0.3),  # 0.04 where it starts
        ("simpo", "eval_rewards/margins", 0.3),  # 0.08 where it starts
    ],
)
def test_chosen_rises_above_rejected(tmp_path: Path, name: str, figure: str, least: float) -> None:
    run, _ = run_of(tmp_path, name, "train.learning_rate=3.0e-3")
    told = values(run)
    assert [v for v in told if figure in v][-1][figure] > least
    assert [v for v in told if "eval_loss" in v][-1]["eval_loss"] < told[0]["loss"]


def divergence(run: Run, recipe: Recipe, *, answers: int = 4) -> float:
    """KL(policy || reference) of a whole answer, in nats: the mean of log pi(y|x) - log pi_ref(y|x) over `answers` answers y to
    each held-out prompt x, sampled from the policy at temperature 1."""
    stop_ids = ChatFacts.read(run.model).stop_ids
    base = find_base(recipe, stop_ids=stop_ids)
    policy = tuned_policy(base, run.model)
    policy.probe()
    store = held_out_rows(base, recipe, "validation", Emitter(None))
    prompts = [store[i].segments[0].tokens_T for i in range(len(store))]
    sampler = Sampler(policy, stop_ids=stop_ids, pad_id=base.pad_id)
    made = sampler([prompt_T.tolist() for prompt_T in prompts], answers, Sampling(max_new_tokens=24), seed=0)
    samples = [
        asked_and_answered(str(i), prompt_T, [np.asarray(one.ids, np.int32) for one in group], [True] * answers)
        for i, (prompt_T, group) in enumerate(zip(prompts, made, strict=True))
    ]
    rows = policy.rows(samples, 4096)
    said, before = (Reference(policy, began).leaf_logprobs(samples, rows) for began in (nullcontext, policy.base))
    return float((said - before).mean())


@pytest.mark.timeout(1800)
def test_dpo_widens_the_margin_and_a_larger_beta_stays_nearer(tmp_path: Path) -> None:
    """From a model that files messages already, with a twentieth of beta and with all of it, in as many steps.

    Labels are taken to be wrong one time in five. A pair's loss is then least at a margin of log(0.8 / 0.2) = 1.4, which is a
    log-ratio of 14 or of 0.7, and that is what beta keeps. Labels without doubt have it least at no finite margin: there the loss
    asks every beta to go on for ever, and in so many steps Adam takes the larger as far as the smaller.
    """
    first, recipe = run_of(tmp_path, "sft", "train.batch_size=16", "train.learning_rate=2.0e-3", steps=90)
    export(first, recipe, Emitter(None), order=Order(to=str(tmp_path / "filing"), format="hf"))
    common = (
        f"model={tmp_path / 'filing'}", "objective.label_smoothing=0.2", "train.learning_rate=2.0e-3",
        "data.split={train: 0.8, validation: 0.2, test: 0.0}",
    )  # fmt: skip
    far: dict[float, float] = {}
    for beta in (0.1, 2.0):
        output = f"train.output_dir={tmp_path / f'beta-{beta}'}"
        run, recipe = run_of(tmp_path, "dpo", *common, f"objective.beta={beta}", output, steps=90)
        found = next(v for v in reversed(values(run)) if "eval_rewards/margins" in v)
        assert found["eval_rewards/margins"] > 0.1
        assert found["eval_rewards/accuracies"] > 0.6
        far[beta] = divergence(run, recipe)
    assert far[2.0] < 0.5 < 1.0 < far[0.1]
