"""Chain files: what they may say, and what is refused before anything runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.errors import RecipeError, TunedockError
from tunedock.recipe.chain import EvalStage, ExportStage, TrainStage, as_written, needs, read_chain

GOOD = """\
output_dir: out
defaults:
  offline: true
  data: {max_length: 64}
stages:
  - name: sft
    recipe: sft.yaml
    train: {seed: 7}
  - name: rm
    model: stage:sft
    objective: reward
    data: {train: pairs.jsonl}
  - name: policy
    model: {path: stage:sft}
    objective: {kind: grpo, rewards: [exact_match, stage:rm, {kind: model, path: stage:rm, weight: 2.0}]}
    data: {train: prompts.jsonl}
  - {name: scores, eval: policy, split: validation, options: {max_samples: 5, tasks: [own], tasks_path: tasks}}
  - {name: model, export: policy, to: ../exported}
"""


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "sft.yaml").write_text("model: some/model\ndata: {train: rows.jsonl, max_length: 32}\n")

    def write(text, *overrides):
        path = tmp_path / "chain.yaml"
        path.write_text(text)
        return read_chain(path, overrides)

    return write


def test_the_stages_of_a_chain(chain, tmp_path):
    found = chain(GOOD)
    assert [stage.name for stage in found.stages] == ["sft", "rm", "policy", "scores", "model"]
    assert found.output_dir == tmp_path / "out"
    sft, _rm, policy, scores, model = found.stages
    assert isinstance(sft, TrainStage) and isinstance(scores, EvalStage) and isinstance(model, ExportStage)
    assert [needs(stage) for stage in found.stages] == [(), ("sft",), ("sft", "rm"), ("policy",), ("policy",)]
    assert [(r.stage, r.key, r.use) for r in policy.references] == [
        ("sft", "model.path", "weights"),
        ("rm", "objective.rewards.1.path", "run"),
        ("rm", "objective.rewards.2.path", "run"),
    ]
    assert scores.split == "validation"
    assert scores.overrides == ("max_samples=5", 'tasks=["own"]', f'tasks_path="{tmp_path / "tasks"}"')
    assert model.to == tmp_path.parent / "exported"


def test_defaults_then_the_file_then_the_stage_then_the_command_line(chain, tmp_path):
    (sft,) = (s for s in chain(GOOD, "sft.train.seed=9", "defaults.train.batch_size=2").stages if s.name == "sft")
    loaded = sft.load(as_written)
    assert loaded.recipe.data.max_length == 32
    assert (loaded.recipe.train.seed, loaded.recipe.train.batch_size, loaded.recipe.offline) == (9, 2, True)
    assert str(loaded.origin(("data", "max_length"))) == f"{tmp_path / 'sft.yaml'}:2"
    assert str(loaded.origin(("offline",))) == f"{tmp_path / 'chain.yaml'}:3"
    assert str(loaded.origin(("train", "seed"))) == "command line"


def test_results_are_put_in_the_place_of_references(chain):
    policy = chain(GOOD).stage("policy")
    put = policy.merged(lambda reference: f"/{reference.use}/{reference.stage}").result()
    assert put["model"] == {"path": "/weights/sft"}
    assert put["objective"]["rewards"][1:] == [
        {"kind": "model", "path": "/run/rm"},
        {"kind": "model", "path": "/run/rm", "weight": 2.0},
    ]


def test_a_reference_on_the_command_line(chain):
    found = chain(GOOD, "rm.model=/a/base")
    assert needs(found.stage("rm")) == ()
    assert needs(chain(GOOD, "rm.model=stage:sft").stage("rm")) == ("sft",)


STAGES = "stages:\n  - {{name: a, model: m/m, data: {{train: r.jsonl}}}}\n{}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: x\ndata: {train: r}\n", "this is no chain"),
        ("stages: []\n", "a list of at least one stage"),
        ("stages: {a: {}}\n", "a list of at least one stage"),
        ("stages: [sft]\n", "a list of at least one stage"),
        ("default: {}\nstages: [{name: a}]\n", "`default` is not a key of a chain"),
        ("defaults: 3\nstages: [{name: a}]\n", "`defaults` holds sections"),
        ("output_dir: 3\nstages: [{name: a, model: m/m}]\n", "`output_dir: 3` is no folder"),
        ("stages: [{recipe: a.yaml}]\n", "a stage needs a `name`"),
        ("stages: [{name: ../a}]\n", "no name of a stage"),
        ("stages: [{name: 7}]\n", "no name of a stage"),
        ("stages: [{name: models}]\n", "cannot be called `models`"),
        ("stages: [{name: chain}]\n", "cannot be called `chain`"),
        (STAGES.format("  - {name: a, model: m/m}"), "two stages are called `a`"),
        (STAGES.format("  - {name: b, model: stage:c}"), "`b` needs `c`, and there is no such stage"),
        (STAGES.format("  - {name: b, model: stage:b}"), "`b` needs itself"),
        (STAGES.format("  - {name: b, model: stage:c}\n  - {name: c, model: m/m}"), "`c`, which comes after it"),
        (STAGES.format("  - {name: b, model: stage:c}\n  - {name: c, model: stage:b}"), "`b` and `c` need each other"),
        (STAGES.format("  - {name: b, data: {train: stage:a}}"), "no stage's result can stand there"),
        (STAGES.format("  - {name: b, eval: a, max_samples: 5}"), "`max_samples` is no key of a stage with `eval`"),
        (STAGES.format("  - {name: b, eval: a, split: held}"), "split: held"),
        (STAGES.format("  - {name: b, eval: 3}"), "eval: 3"),
        (STAGES.format("  - {name: b, export: a, format: exe}"), "format: exe"),
        (
            STAGES.format("  - {name: b, export: a, format: gguf, quantize: int8}"),
            "stage `b`: `int8` is no kind of --format gguf",
        ),
        (STAGES.format("  - {name: b, export: a}\n  - {name: c, export: b}"), "`b` trains nothing"),
        (STAGES.format("  - {name: b, eval: a}\n  - {name: c, model: stage:b}"), "`b`, which only measures"),
        (STAGES.format("  - {name: b, recipe: no.yaml}"), "no such file"),
        (STAGES.format("  - {name: b, recipe: [3]}"), "`recipe` is a file or a list of files"),
        (STAGES.format("  - {name: b, model: m/m, train: {output_dir: x}}"), "`train.output_dir` has no place"),
        ("stages: [{name: a, model: 1, model: 2}]\n", "stands twice"),
    ],
)
def test_what_is_refused(chain, tmp_path, text, reason):
    with pytest.raises(RecipeError, match=reason) as raised:
        chain(text)
    assert raised.value.where and str(tmp_path) in raised.value.where


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.seed=3", "there is no stage `train`"),
        ("seed=3", "does not name a stage and a key"),
        ("sft", "does not name a stage"),
        ("model.to=x", "an export has no keys"),
        ("sft.train.output_dir=x", "the chain says where"),
        ("sft.=3", "does not name a stage"),
        ("sft.model.path.x=3", "is a value"),
        ("policy.data.train=stage:sft", "no stage's result can stand there"),
    ],
)
def test_changes_that_are_refused(chain, override, reason):
    with pytest.raises(RecipeError, match=reason):
        chain(GOOD, override)


@given(
    st.text(max_size=300)
    | st.sampled_from(GOOD.split("\n")).flatmap(lambda line: st.just(GOOD.replace(line, line[:7])))
)
def test_any_text_is_a_chain_or_an_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "chain.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert read_chain(folder / "chain.yaml").stages
    except TunedockError as error:
        assert isinstance(error, RecipeError)
