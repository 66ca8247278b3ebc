"""What people get wrong, through the command line: exit code, no traceback, the key, file or row by name, and the way out.

What reaches a worker runs it inline (`inline_worker`), for importing torch again for each case would take minutes; a few cases
at the end start real processes. After every refusal nothing half-made may lie about: no run directory, or one that records it.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import CHATML, save_tiny
from inline_worker import InlineLauncher
from tunedock.cli.app import main
from tunedock.run.record import Run

RECIPE = """\
model: ./base
adapter: {r: 4}
offline: true
data: {train: ./rows.jsonl, max_length: 128, cache_dir: ./cache}
train: {max_steps: 2, batch_size: 4, save_steps: 1, bf16: false, token_budget: 512, report_to: none}
eval: {max_samples: 2, max_new_tokens: 4}
"""


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ]
        }
        for i in range(count)
    ]


def as_lines(values: list[Any]) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a recipe that work; each case spoils one thing, in files of its own."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny("qwen3", folder / "base")
    (folder / "rows.jsonl").write_text(as_lines(rows(40)))
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "no-system.jinja").write_text(
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
        + CHATML
    )
    return folder


@pytest.fixture
def tunedock(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in the workplace, workers inline: (exit code, standard output, standard error)."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return run


def assert_refused(answer: tuple[int, str, str], code: int, *words: str, hint: bool = True) -> None:
    got, out, err = answer
    assert got == code, err
    assert "Traceback" not in err
    assert out == ""
    for word in words:
        assert word in err
    assert ("\nhint: " in err) == hint
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].count(": ") >= 2, f"no place is named: {lines[0]}"


def assert_nothing_left(folder: Path, name: str, code: int) -> None:
    """No run directory, or one whose run.json tells the failure; no half-written file anywhere."""
    path = folder / "runs" / name
    if path.exists():
        state = Run(path).state()
        assert (state.status, state.exit_code) == ("failed", code)
        assert state.error is not None
        assert state.error["message"]
        assert not (path / "model").exists()
        assert not any((path / "checkpoints").iterdir())
        assert not Run(path).locked()
    parts = [p for p in folder.rglob(".*") if p.name.endswith(".part") or p.parent == folder / "cache" / "data"]
    assert parts == []


# -- refused before anything starts -----------------------------------------------------------------------------------

IN_THE_RECIPE = {
    "unknown-key": (
        ["train.learning_rat=1e-4"],
        2,
        ["`train.learning_rat` is not a key", "did you mean `train.learning_rate`?"],
    ),
    "unknown-key-in-file": (["typo.yaml"], 2, ["typo.yaml:2: ", "`trian` is not a key", "did you mean `train`?"]),
    "wrong-type-in-file": (["type.yaml"], 2, ["type.yaml:1: ", "should be a whole number", "without quotes"]),
    "quoted-number": (["train.batch_size='16'"], 2, ["`train.batch_size: ", "a whole number", "without quotes"]),
    "no-value": (["train.seed=null"], 2, ["`train.seed: null` should be a whole number", "or leave out `train.seed`"]),
    "missing-data-file": (
        ["data.train=row.jsonl"],
        2,
        ["data.train.0.path: row.jsonl", "row.jsonl`", "did you mean `rows.jsonl`"],
    ),
    "missing-template": (
        ["model={path: base, chat_template: x.jinja}"],
        2,
        ["model.chat_template: x.jinja", "there is no "],
    ),
    "fractions": (
        ["data.split={train: 0.6, validation: 0.5, test: 0.1}"],
        2,
        ["do not add up to 1", "data.split.train: 0.6", "data.split.validation: 0.5", "leave out `data.split.train`"],
    ),
    "bad-yaml": (["broken.yaml"], 2, ["broken.yaml:2:1: not valid YAML", "expected ',' or '}'"]),
    "learning-rate-negative": (["train.learning_rate=-1"], 2, ["`train.learning_rate: -1` should be a number above 0"]),
    "adapter-not-built": (
        ["adapter.kind=loha"],
        2,
        ["`adapter.kind: loha` is not built yet (today: lora, full, freeze)"],
    ),
    "quantize-unknown": (["quantize=int3"], 2, ["`quantize: int3` should be none, nf4, int8 or fp8"]),
    "qlora-by-its-name": (["adapter=qlora"], 2, ["has no `qlora`", "`adapter: lora` with `quantize: nf4`"]),
    "awq-by-its-name": (["quantize=awq"], 2, ["give it as `model`"]),
    "quantized-and-full": (["quantize=nf4", "adapter=full"], 2, ["quantized weights stay as they are"]),
    "launch-not-built": (
        ["launch.on=kubernetes"],
        2,
        ["`launch.on: kubernetes` is not built yet (today: local, docker, compose)"],
    ),
}
WITHOUT_HINT = {
    "bad-yaml",
    "learning-rate-negative",
    "adapter-not-built",
    "launch-not-built",
    "missing-template",
}
"""The message itself says what would do."""


@pytest.mark.parametrize("case", IN_THE_RECIPE)
def test_a_recipe_that_cannot_be_is_refused_before_anything_starts(workplace, tunedock, case):
    arguments, code, words = IN_THE_RECIPE[case]
    (workplace / "typo.yaml").write_text("model: ./base\ntrian: {max_steps: 2}\n")
    (workplace / "type.yaml").write_text('train: {batch_size: "16"}\n')
    (workplace / "broken.yaml").write_text("train: {max_steps: 2\n")
    answer = tunedock("train", "r.yaml", *arguments, f"train.output_dir=runs/{case}")
    assert_refused(answer, code, *words, hint=case not in WITHOUT_HINT)
    assert not (workplace / "runs" / case).exists()


def test_all_problems_of_a_recipe_are_told_at_once(tunedock):
    code, _, err = tunedock("train", "r.yaml", "train.fp16=true", "train.bf16=true", "train.max_steps=0")
    assert code == 2
    assert err.startswith(
        "error: the recipe has 2 problems\n  command line: `train.bf16` and `train.fp16` are both true"
    )
    assert "  command line: `train.max_steps: 0` trains nothing" in err
    assert err.count("    hint: ") == 2


def test_a_missing_recipe_file_names_its_neighbours(tunedock):
    assert_refused(tunedock("train", "nope.yaml"), 2, "nope.yaml: there is no such file", "r.yaml")


def test_an_error_is_one_json_document_with_json(tunedock):
    code, out, err = tunedock("train", "r.yaml", "train.learning_rat=1", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"] == {
        "kind": "RecipeError",
        "message": "`train.learning_rat` is not a key of a recipe",
        "where": "command line",
        "hint": "did you mean `train.learning_rate`?",
    }


# -- data -------------------------------------------------------------------------------------------------------------


def spoilt(change: Callable[[dict[str, Any]], Any], count: int = 20) -> str:
    """Rows of which the fourth is spoilt."""
    made = rows(count)
    change(made[3]["messages"][1])
    return as_lines(made)


def _no_answer(folder: Path) -> str:
    made = rows(20)
    made[3]["messages"].pop()
    return as_lines(made)


CSV = "instruction,output\n" + "".join(f"Say {i},It is {i}\n" for i in range(20))
DROPPED = "`data.max_dropped: 0.01` allows"

BAD_DATA: dict[str, tuple[str, str | bytes, list[str], list[str]]] = {
    "empty-file": ("empty.jsonl", "", [], ["empty.jsonl: the file is empty", "take it out of the source"]),
    "broken-json": ("b.json", '[{"messages": [}]', [], ["b.json:1:16: this is no JSON", ".jsonl file"]),
    "broken-line": (
        "l.jsonl",
        as_lines([*rows(10), '{"messages": [', *rows(10)]),
        [],
        [
            "1 of 21 rows (4.8%)",
            DROPPED,
            "broken_json 1 (first: l.jsonl:11: Expecting value at column 15)",
            "data check",
        ],
    ),
    "no-readable-line": (
        "n.jsonl",
        as_lines(['{"messages": ['] * 10),
        [],
        ["none of the first 10 row(s)", "n.jsonl:1: Expecting value"],
    ),
    "binary": (
        "bin.jsonl",
        bytes(range(128, 256)) * 40,
        [],
        ["bin.jsonl: none of the first 1 row(s)", "byte 0x80 at 0 is no UTF-8"],
    ),
    "compressed": ("gz.jsonl", gzip.compress(as_lines(rows(40)).encode()), [], ["gz.jsonl: none of", "(.jsonl.gz)"]),
    "wrong-role": (
        "role.jsonl",
        spoilt(lambda m: m.update(role="robot")),
        [],
        ["wrong_roles 1 (first: role.jsonl:4: `messages[1]`", "'robot'"],
    ),
    "no-assistant-turn": (
        "noa.jsonl",
        _no_answer(Path()),
        [],
        ["no_assistant_turn 1 (first: noa.jsonl:4", DROPPED, "data check"],
    ),
    "empty-answers": (
        "e.jsonl",
        spoilt(lambda m: m.update(content=" "), 50),
        [],
        ["1 of 50 rows (2.0%)", "empty_answer 1 (first: e.jsonl:4"],
    ),
    "over-length": (
        "long.jsonl",
        spoilt(lambda m: m.update(content="long " * 300), 200),
        ["data.over_length=error"],
        [
            "long.jsonl:4: 1 of 200 rows are longer than `data.max_length`",
            "tokens > max_length 128",
            "raise `data.max_length`",
        ],
    ),
    "too-few-rows": (
        "two.jsonl",
        as_lines(rows(2)),
        [],
        ["data.split: 2 row(s)", "leave none to train on", "add rows"],
    ),
    "no-group-column": (
        "rows.jsonl",
        "",
        ["data.split.group_by=customer"],
        ["column `customer`, which groups the rows", "data.split.group_by"],
    ),
    "no-such-column": (
        "rows.jsonl",
        "",
        ["data.train=[{path: rows.jsonl, columns: {prompt: question, completion: reply}}]"],
        ["rows.jsonl: `columns: {prompt: question}`", "has a column `question`", "the columns are messages"],
    ),
    "no-such-name": (
        "rows.jsonl",
        "",
        ["data.train=[{path: rows.jsonl, columns: {promt: messages}}]"],
        ["rows.jsonl: `columns: {promt: messages}`", "no format has a `promt`", "did you mean `prompt`?"],
    ),
    "csv-rows": (
        "c.csv",
        CSV + "alone\n",
        [],
        ["wrong_columns 1 (first: c.csv:22: 1 fields under 2 columns)", DROPPED],
    ),
    "csv-quote": ("q.csv", CSV + '"open,a\n' + CSV, [], ["q.csv:22: a quote is opened and never closed", "twice"]),
    "unknown-extension": ("rows.xyz", "x", [], ["rows.xyz: `.xyz` is no known extension", ".jsonl"]),
    "offline-data": ("rows.jsonl", "", ["data.train=owner/set"], ["owner/set: `offline: true`", "drop `offline`"]),
    "wrong-objective": (
        "rows.jsonl",
        "",
        ["objective=pretrain"],
        ["data.train: `objective: pretrain` needs documents", "set `objective: sft`"],
    ),
    "system-refused": (
        "rows.jsonl",
        "",
        ["model={path: base, chat_template: no-system.jinja}", "data.system=Be brief."],
        ["template_refused 40 (first: rows.jsonl:1: System role not supported)", "drop `data.system`"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_fail_the_run_and_name_the_row(workplace, tunedock, case):
    name, content, arguments, words = BAD_DATA[case]
    if content or name != "rows.jsonl":
        (workplace / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments = [f"data.train={name}", *arguments]
    assert_refused(tunedock("train", "r.yaml", f"train.output_dir=runs/{case}", *arguments), 3, *words)
    assert Run(workplace / "runs" / case).state().error["kind"] == "DataError"
    assert_nothing_left(workplace, case, 3)


def test_a_tenth_of_a_percent_of_bad_rows_is_counted_and_trained_past(workplace, tunedock):
    (workplace / "few.jsonl").write_text(spoilt(lambda message: message.update(content=""), 200))
    code, _, err = tunedock("train", "r.yaml", "data.train=few.jsonl", "train.output_dir=runs/few")
    assert code == 0
    assert "200 rows read, 199 kept, 1 dropped (empty_answer 1)" in err


def test_data_check_shows_the_account_of_data_that_fail(workplace, tunedock):
    (workplace / "checked.jsonl").write_text(spoilt(lambda message: message.update(content="")))
    code, out, err = tunedock("data", "check", "r.yaml", "data.train=checked.jsonl", "--json")
    value = json.loads(out)
    assert code == 3
    assert (value["read"], value["kept"], value["reasons"]) == (20, 19, {"empty_answer": 1})
    assert value["error"]["kind"] == "DataError"
    assert "Traceback" not in err


# -- models -----------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _narrower(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 96}))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tokenizer-garbage": (
        lambda m: (m / "tokenizer.json").write_text('{"gar'),
        ["the tokenizer cannot be read", "tokenizer.json whole?"],
    ),
    "tokenizer-empty": (
        lambda m: (m / "tokenizer.json").write_text("{}"),
        ["the tokenizer cannot be read", "is missing in it"],
    ),
    "tokenizer-missing": (_no_tokenizer, ["tokenizer-missing: the folder has no tokenizer", "copy tokenizer.json"]),
    "config-missing": (
        lambda m: (m / "config.json").unlink(),
        ["config-missing: config.json is missing", "a folder with a model"],
    ),
    "config-damaged": (
        lambda m: _cut(m / "config.json"),
        ["config-damaged: config.json is damaged", "fetch or copy it again"],
    ),
    "weights-cut": (
        lambda m: _cut(m / "model.safetensors"),
        ["weights-cut/model.safetensors: the file is cut off or damaged"],
    ),
    "weights-missing": (
        lambda m: (m / "model.safetensors").unlink(),
        ["weights-missing: the folder has no weights", "model.init: random"],
    ),
    "weights-pickled": (_pickle, ["the weights are pickled (pytorch_model.bin)", "can run code", "save_pretrained"]),
    "layer-missing": (
        _without_a_layer,
        ["the files lack 11 of the model's tensors: model.layers.1.", "*.safetensors file missing?"],
    ),
    "wrong-shapes": (
        _narrower,
        ["6 tensor(s)", "mlp.down_proj.weight: [64, 128] in the files, [64, 96] by the config"],
    ),
    "no-template": (
        lambda m: (m / "chat_template.jinja").unlink(),
        ["model.chat_template: the tokenizer has no chat template", "Jinja file"],
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_used_is_named_with_what_it_lacks(workplace, tunedock, case):
    spoil, words = BAD_MODELS[case]
    shutil.copytree(workplace / "base", workplace / case)
    spoil(workplace / case)
    assert_refused(tunedock("train", "r.yaml", f"model={case}", f"train.output_dir=runs/{case}"), 4, *words)
    assert_nothing_left(workplace, case, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["model=owner/name"], 4, ["model: owner/name: `offline: true`", "drop `offline`"]),
        (
            ["adapter.target_modules=[q_prj]"],
            4,
            ["adapter.target_modules: ['q_prj']", "linear layers are called", "q_proj"],
        ),
        (
            ["train.lr_scheduler_type=cosin"],
            2,
            ["train.lr_scheduler_type: there is no schedule", "did you mean `cosine`?"],
        ),
        (
            ["train.learning_rate=1e30", "adapter=full", "train.max_steps=6"],
            9,
            ["rows.jsonl:", " is nan at step", "lower train.learning_rate"],
        ),
    ],
)
def test_what_only_the_worker_can_know(workplace, tunedock, arguments, code, words):
    answer = tunedock("train", "r.yaml", "train.output_dir=runs/late", "train.save_strategy=no", *arguments)
    assert_refused(answer, code, *words)
    assert_nothing_left(workplace, "late", code)
    shutil.rmtree(workplace / "runs" / "late")


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(workplace: Path, tunedock: Callable[..., tuple[int, str, str]]) -> Path:
    path = workplace / "runs" / "finished"
    if not path.exists():
        code, _, err = tunedock("train", "r.yaml", "train.output_dir=runs/finished")
        assert code == 0, err
    return path


@pytest.fixture
def halfway(workplace: Path, tunedock: Callable[..., tuple[int, str, str]]) -> Iterator[Path]:
    """A run as one that was killed after its first step leaves it."""
    path = workplace / "runs" / "halfway"
    shutil.copy(workplace / "rows.jsonl", workplace / "own.jsonl")
    code, _, err = tunedock("train", "r.yaml", "data.train=own.jsonl", "train.output_dir=runs/halfway")
    assert code == 0, err
    shutil.rmtree(path / "model")
    shutil.rmtree(path / "checkpoints" / "step-00000002")
    (path / "checkpoints" / "index.json").write_text('{"last": "step-00000001", "best": null, "best_metric": null}')
    Run(path).update(status="running", finished=None)
    assert Run(path).state().status == "lost"
    yield path
    shutil.rmtree(path)


def test_an_output_directory_in_use_is_left_alone(workplace, tunedock, finished):
    before = (finished / "run.json").read_bytes()
    answer = tunedock("train", "r.yaml", "train.output_dir=runs/finished")
    assert_refused(answer, 5, str(finished), "in use", f"train --resume {finished}")
    assert (finished / "run.json").read_bytes() == before
    (workplace / "papers").mkdir()
    (workplace / "papers" / "thesis.tex").write_text("dear")
    answer = tunedock("train", "r.yaml", "train.output_dir=papers")
    assert_refused(answer, 5, "papers: the output directory is in use", "give another `train.output_dir`")
    assert "--resume" not in answer[2]
    assert [path.name for path in (workplace / "papers").iterdir()] == ["thesis.tex"]


def test_an_output_directory_that_cannot_be_made_is_a_disk_error(workplace, tunedock):
    (workplace / "a-file").write_text("x")
    assert_refused(tunedock("train", "r.yaml", "train.output_dir=a-file"), 5, "a-file: the output directory is a file")
    answer = tunedock("train", "r.yaml", "train.output_dir=a-file/run")
    assert_refused(answer, 8, "a-file/run: cannot make the run directory", "give a `train.output_dir`")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["there is no run `nothing`", "tunedock runs list"]),
        ("base", ["base: this folder is no run: it has no run.json", "tunedock runs list"]),
        ("none/such", ["none/such: there is no such file or folder, nor a run", "tunedock runs list"]),
        ("runs/finishd", ["did you mean `finished`?"]),
        ("finishd", ["there is no run `finishd`", "did you mean `finished`?"]),
        ("finished", ["runs/finished: this run is finished", "tunedock eval"]),
    ],
)
def test_only_a_run_that_stopped_early_is_resumed(tunedock, finished, name, words):
    assert_refused(tunedock("train", "--resume", name), 5, *words)
    assert Run(finished).state().status == "finished"


def test_a_run_does_not_go_on_with_other_data(workplace, tunedock, halfway):
    whole = (workplace / "own.jsonl").read_text()
    (workplace / "own.jsonl").write_text(as_lines(rows(41)))
    answer = tunedock("train", "--resume", "halfway")
    assert_refused(answer, 5, "own.jsonl: the data is not what this run began with", "put the files back")
    (workplace / "own.jsonl").unlink()
    assert_refused(tunedock("train", "--resume", "halfway"), 3, "own.jsonl: there is no such file")
    (workplace / "own.jsonl").write_text(whole)
    code, _, err = tunedock("train", "--resume", "halfway")
    assert code == 0, err
    assert "resumed at step 1" in err
    assert Run(halfway).state().status == "finished"


def test_a_run_does_not_go_on_with_another_recipe(tunedock, halfway):
    answer = tunedock("train", "r.yaml", "data.train=own.jsonl", "train.learning_rate=0.5", "--resume", "halfway")
    assert_refused(answer, 2, "`train.learning_rate` was 0.0001, is 0.5", "start a new run without --resume")
    answer = tunedock("train", "--resume", "halfway", "train.learning_rate=0.5")
    assert_refused(answer, 2, "a resumed run keeps its recipe", "start a new run")


def test_a_damaged_checkpoint_is_not_resumed_from(tunedock, halfway):
    _cut(halfway / "checkpoints" / "step-00000001" / "trained.safetensors")
    for _ in range(2):  # nor by a second try, which would find no checkpoint and must not begin from nothing
        assert_refused(tunedock("train", "--resume", "halfway"), 5, "checkpoints: there is no whole checkpoint")
    assert (halfway / "checkpoints" / "damaged-step-00000001").is_dir()


def test_a_run_that_failed_before_its_first_checkpoint_begins_again(workplace, tunedock):
    (workplace / "late.jsonl").write_text(spoilt(lambda message: message.update(content="")))
    arguments = ("data.train=late.jsonl", "train.output_dir=runs/again")
    assert_refused(tunedock("train", "r.yaml", *arguments), 3, "empty_answer")
    for command in (["eval", "again"], ["export", "again", "--to", "again-out"]):
        assert_refused(tunedock(*command), 5, "again: the run has no result yet", "tunedock train --resume")
    (workplace / "late.jsonl").write_text(as_lines(rows(20)))
    code, _, err = tunedock("train", "--resume", "again")
    assert code == 0, err
    assert "no checkpoint yet, so it begins at its first step" in err


def test_a_damaged_run_is_no_traceback(workplace, tunedock, finished):
    for name, content in (("torn", '{"name": "to'), ("strange", '{"future": true}')):
        shutil.copytree(finished, workplace / "runs" / name)
        (workplace / "runs" / name / "run.json").write_text(content)
        for command in (["train", "--resume", name], ["runs", "show", name], ["eval", name]):
            assert_refused(tunedock(*command), 5, f"runs/{name}/run.json: ", hint=name == "strange")
        assert [name, "damaged"] in [line.split()[:2] for line in tunedock("runs", "list")[1].splitlines()]
        assert tunedock("runs", "delete", name, "--yes")[0] == 0


# -- evaluation and export --------------------------------------------------------------------------------------------


def test_evaluation_of_rows_that_are_not_there(workplace, tunedock, finished):
    assert_refused(
        tunedock("eval", "finished", "--split", "tset"),
        3,
        "--split: there is no split `tset`",
        "train, validation, test",
    )
    assert_refused(
        tunedock("eval", "finished", "max_sample=3"), 2, "`eval.max_sample`", "did you mean `eval.max_samples`?"
    )
    assert_refused(tunedock("eval", "finished", "train.seed=3"), 2, "`train.seed=3`", "`max_samples=50`")
    tunedock("train", "r.yaml", "train.output_dir=runs/testless", "data.split.test=0", "data.split.validation=0.1")
    answer = tunedock("eval", "testless")
    assert_refused(answer, 3, "data.split: the test split is empty", "`--split validation`", "set `data.split.test`")
    assert not (workplace / "runs" / "testless" / "eval").exists()


def test_an_export_writes_over_nothing(workplace, tunedock, finished):
    (workplace / "used").mkdir()
    (workplace / "used" / "letter.txt").write_text("dear")
    assert_refused(
        tunedock("export", "finished", "--to", "used"), 5, "used: the target of the export is in use", "new or empty"
    )
    assert [path.name for path in (workplace / "used").iterdir()] == ["letter.txt"]
    (workplace / "file").write_text("x")
    assert_refused(
        tunedock("export", "finished", "--to", "file/out"), 8, "file/out: the export cannot be written", "--to"
    )
    assert (workplace / "file").read_text() == "x"


def test_whole_weights_have_no_adapter_to_export(workplace, tunedock):
    assert tunedock("train", "r.yaml", "adapter=full", "train.output_dir=runs/whole")[0] == 0
    answer = tunedock("export", "whole", "--to", "adapter-of-whole", "--format", "adapter")
    assert_refused(answer, 2, "--format adapter: this run trained whole weights", "use --format hf")
    assert not list(workplace.glob("*adapter-of-whole*"))
    assert not list(workplace.glob(".adapter-of-whole*"))


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size; only root may."""
    place = tmp_path / "disk"
    mounted = []

    def mount(options: str) -> Path:
        place.mkdir(exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
        mounted.append(place)
        return place

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root on Linux")
    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_disk_full_before_the_run_begins_leaves_nothing(tunedock, small_disk):
    disk = small_disk("size=8k")  # a file or two
    answer = tunedock("train", "r.yaml", f"train.output_dir={disk / 'run'}")
    assert_refused(answer, 8, f"{disk}/run", "cannot", "No space left on device")
    assert list(disk.iterdir()) == []


def test_a_full_disk_of_the_cache_leaves_no_half_data_set(workplace, tunedock, small_disk):
    disk = small_disk("size=20k")
    answer = tunedock("train", "r.yaml", f"data.cache_dir={disk}", "train.output_dir=runs/cacheless")
    assert_refused(answer, 8, f"{disk}/data/", "the tokenised data cannot be written: ", "set `data.cache_dir`")
    assert list((disk / "data").iterdir()) == []
    assert_nothing_left(workplace, "cacheless", 8)


def test_a_disk_that_cannot_be_written(tunedock, small_disk):
    disk = small_disk("size=1m,ro")
    answer = tunedock("train", "r.yaml", f"train.output_dir={disk / 'run'}")
    assert_refused(answer, 8, f"{disk}/run: cannot make the run directory: Read-only file system", "can be written")


# -- real processes ---------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tunedock", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def process(folder: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, **options
    )
    return done.returncode, done.stdout, done.stderr


def wait_for(what: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)


def test_a_real_worker_tells_its_error_and_keeps_it(workplace):
    made = rows(20)
    made[3]["messages"].pop()
    (workplace / "real.jsonl").write_text(as_lines(made))
    answer = process(workplace, "train", "r.yaml", "data.train=real.jsonl", "train.output_dir=runs/real")
    assert_refused(answer, 3, "no_assistant_turn 1 (first: real.jsonl:4", "data check")
    assert_nothing_left(workplace, "real", 3)
    assert_refused(
        process(workplace, "chat", "real", input="Hello?\n"), 5, "runs/real: the run has no result yet", "--resume"
    )


def test_a_run_at_work_is_left_to_its_process(workplace):
    arguments = ("train.output_dir=runs/busy", "train.max_steps=100000", "train.save_steps=100000")
    with subprocess.Popen(
        command("train", "r.yaml", *arguments), cwd=workplace, env=environment(), stderr=subprocess.PIPE, text=True
    ) as first:
        run = Run(workplace / "runs" / "busy")
        wait_for(lambda: run.events.is_file() and '"loss"' in run.events.read_text(), first)
        for again in (["train", "--resume", "busy"], ["eval", "busy"], ["runs", "delete", "busy", "--yes"]):
            assert_refused(process(workplace, *again), 5, "runs/busy: a process is at work in this run")
        assert_refused(
            process(workplace, "train", "r.yaml", *arguments), 5, "runs/busy: the output directory is in use"
        )
        assert run.state().status == "running"
        first.send_signal(2)
        _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert f"hint: go on with `tunedock train --resume {run.path}`" in err
    assert run.state().status == "interrupted"


def fill(folder: Path) -> Path:
    """A file that takes all that is left of the disk."""
    path = folder / "films"
    with path.open("wb", buffering=0) as films, pytest.raises(OSError) as full:
        while True:
            films.write(b"\0" * 4096)
    assert full.value.errno == errno.ENOSPC
    return path


@pytest.mark.parametrize("saving", ["steps", pytest.param("no", marks=pytest.mark.long)])
def test_a_disk_that_fills_up_in_the_middle_of_a_run(workplace, small_disk, saving):
    disk = small_disk("size=1m")
    run = Run(disk / "run")
    arguments = (
        f"train.output_dir={run.path}",
        "train.max_steps=400",
        f"train.save_strategy={saving}",
        "train.save_steps=20",
    )
    with subprocess.Popen(
        command("train", "r.yaml", *arguments), cwd=workplace, env=environment(), stderr=subprocess.PIPE, text=True
    ) as first:
        wait_for(lambda: run.events.is_file() and '"step":20,' in run.events.read_text(), first)
        films = fill(disk)
        _, err = first.communicate(timeout=60)
    assert_refused(
        (first.returncode, "", err), 8, str(run.path), "free disk space", f"tunedock train --resume {run.path}"
    )
    films.unlink()
    assert not list(run.path.rglob("*.part"))
    code, _, err = process(workplace, "train", "--resume", str(run.path))
    assert code == 0, err
    assert ("resumed at step " if saving == "steps" else "no checkpoint yet") in err
    assert run.state().status == "finished"
