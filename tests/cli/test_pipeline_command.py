"""`tunedock pipeline`: what it prints, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain" / "chain.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_of_the_example(here, tunedock):
    code, out, _ = tunedock("pipeline", str(EXAMPLE), "--plan")
    assert code == 0
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines == ["stage", "pretrain", "sft", "reward", "ppo", "scores", "model"]
    assert "`sft` and `reward` run before it" in out
    assert not list(here.iterdir())


def test_the_plan_as_json(here, tunedock):
    code, out, _ = tunedock("pipeline", str(EXAMPLE), "--plan", "--json", "--dir", "elsewhere")
    assert code == 0
    stages = json.loads(out)["stages"]
    assert {stage["action"] for stage in stages} == {"run"}
    assert stages[3]["what"] == "ppo"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.yaml"], "there is no such file"),
        ([str(EXAMPLE.parents[1] / "demo" / "recipe.yaml")], "this is no chain"),
        ([str(EXAMPLE), "sft.train.learning_rat=1"], "stage `sft`: `train.learning_rat` is not a key of a recipe"),
        ([str(EXAMPLE), "ppo.objective.rewards.1.path=stage:sft"], "takes a reward model, and `sft` trains"),
        ([str(EXAMPLE), "ppo.model=stage:reward"], "trains a reward model, which scores and does not answer"),
        ([str(EXAMPLE), "ppo.objective.rewards=[exact]"], "there is no function `exact` of tunedock's own"),
        ([str(EXAMPLE), "ppo.objective.rewards.1.weigth=1"], "`objective.rewards.1.weigth` is not a key"),
        ([str(EXAMPLE), "ppo.objective.rewards.1.kind=oracle"], "should be function, model or judge"),
        (
            [str(EXAMPLE), "defaults.launch.nodes=2", "defaults.launch.rendezvous=host:29500"],
            "a chain trains many runs",
        ),
        ([str(EXAMPLE), "--from", "nowhere"], "there is no stage `nowhere`"),
    ],
)
def test_errors_name_the_stage_and_the_key(here, tunedock, arguments, told):
    code, _, error = tunedock("pipeline", *arguments, "--plan")
    assert (code, told in error) == (2, True), error
    assert not list(here.iterdir())
