"""A search: trials are runs, bad ones end early, a kill loses nothing, and the space is checked before the first."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from tunedock.errors import InterruptedRun, RecipeError, RunError, TunedockError
from tunedock.launch.local import LocalLauncher
from tunedock.recipe.load import load
from tunedock.recipe.resolve import resolve
from tunedock.recipe.search import Search
from tunedock.run.record import Run
from tunedock.search.page import page
from tunedock.search.trials import Found, search

WORKER = Path(__file__).with_name("made_up_worker.py")
RATE = "train.learning_rate: {log_uniform: [1.0e-5, 1.0e-2]}"


def quick(pause_s: float = 0.0) -> LocalLauncher:
    return LocalLauncher([sys.executable, str(WORKER), str(pause_s)])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    return tmp_path


def write(place: Path, section: str, more: str = "") -> Path:
    path = place / "r.yaml"
    path.write_text(f"model: some/model\ndata: {{train: ./rows.jsonl}}\n{more}search:\n{section}")
    return path


def found_by(place: Path, section: str, name: str = "s", **options: Any) -> Found:
    return search([write(place, section)], folder=place / name, launcher=options.pop("launcher", quick()), **options)


def space(*lines: str, **settings: Any) -> str:
    head = "".join(f"  {key}: {value}\n" for key, value in settings.items())
    return head + "  space:\n" + "".join(f"    {line}\n" for line in lines)


def test_trials_are_runs_and_the_best_recipe_is_written(place: Path) -> None:
    events: list[Any] = []
    found = found_by(
        place, space(RATE, "adapter.r: {choice: [4, 16]}", trials=4, pruner="none"), on_event=events.append
    )
    assert [row.state for row in found.rows] == ["complete"] * 4
    assert found.best is not None and found.best.value == min(row.value for row in found.rows if row.value is not None)
    best = resolve(load([place / "s" / "best.yaml"])).recipe
    assert best.train.learning_rate == found.best.values["train.learning_rate"]
    assert best.adapter.alpha == 2 * found.best.values["adapter.r"], "what is derived is derived for the trial"  # type: ignore[union-attr]
    assert best.search is None and best.train.output_dir.startswith(str(place / "runs"))  # type: ignore[union-attr]
    run = Run.open(Path(found.best.run))
    assert run.state().status == "finished" and run.path.parent == place / "s" / "trials"
    assert json.loads((place / "s" / "trials.json").read_text()) == json.loads(json.dumps(found.to_json()))
    said = [event["message"] for event in events if event["kind"] == "note"]
    assert sum(message.startswith("trial ") for message in said) == 4


def test_a_worse_trial_is_pruned_and_its_worker_stopped_cleanly(place: Path) -> None:
    section = space("train.learning_rate: {choice: [1.0e-3, 2.0e-3, 3.0e-3, 1.0e-6]}", trials=4, sampler="grid", seed=1)
    found = found_by(place, section, launcher=quick(0.3))
    states = {row.values["train.learning_rate"]: row for row in found.rows}
    assert [row.state for row in found.rows] == ["complete", "complete", "complete", "pruned"]
    pruned = states[1e-6]
    assert pruned.step is not None and pruned.step < 4
    assert Run.open(Path(pruned.run)).state().status == "interrupted"
    assert found.best is states[1e-3]


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(place: Path) -> None:
    found = found_by(place, space("train.learning_rate: {choice: [1.0, 1.0e-3]}", trials=5, sampler="grid"))
    rows = {row.values["train.learning_rate"]: row for row in found.rows}
    assert len(rows) == len(found.rows) == 2, "a grid has an end"
    assert rows[1.0].state == "fail" and rows[1.0].why == "the loss is nan at step 1"
    assert found.best is rows[1e-3]


def test_a_search_that_was_stopped_goes_on_where_it_was(place: Path) -> None:
    """The same trials with the same values as one that was not; the trial in the middle is gone on with."""
    section = space(RATE, "adapter.r: {choice: [4, 8, 16]}", trials=3, pruner="none")
    straight = found_by(place, section, "straight")
    stopped: list[int] = []

    def stop(event: Any) -> None:
        """As Ctrl-C does, in the middle of the third trial."""
        if event["kind"] == "metrics" and event["step"] == 2:
            stopped.append(event["step"])
            if len(stopped) == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun, match="stopped after 2 of 3 trials; everything is kept") as caught:
        found_by(place, section, launcher=quick(0.3), on_event=stop)
    assert f"--resume {place / 's'}" in str(caught.value)
    assert (place / "s" / "best.yaml").is_file() and "running" in (place / "s" / "trials.json").read_text()
    resumed = found_by(place, section, resume=True)
    assert [(row.values, row.value) for row in resumed.rows] == [(row.values, row.value) for row in straight.rows]
    events = [json.loads(line) for line in (place / "s" / "trials" / "0002" / "events.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["kind"] == "metrics"]
    assert sorted(set(steps)) == [1, 2, 3, 4] and len(steps) <= 5, "the trial was not begun anew"
    more = found_by(place, section.replace("trials: 3", "trials: 4"), resume=True)
    assert len(more.rows) == 4


def test_a_trial_that_ended_unheard_has_the_value_it_told(place: Path) -> None:
    """Killed between the end of a trial and its entry in the study: its result counts, not the last evaluation on the way."""
    section = space(RATE, trials=1, pruner="none")

    def killed(event: Any) -> None:
        if event["kind"] == "result":
            raise InterruptedRun("as a kill would")

    with pytest.raises(InterruptedRun):
        found_by(place, section, on_event=killed)
    events = place / "s" / "trials" / "0000" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    lines[-1]["value"]["eval_loss"] = 0.25  # that of the best weights, where the recipe keeps those
    events.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (row,) = found_by(place, section, resume=True).rows
    assert (row.state, row.value) == ("complete", 0.25)


def test_a_metric_that_no_evaluation_tells_ends_the_search_with_the_first_trial(place: Path) -> None:
    with pytest.raises(RecipeError, match="do not tell `eval_bleu`") as raised:
        found_by(place, space(RATE, trials=3, metric="eval_bleu"))
    assert raised.value.where == "search.metric" and "eval_loss, eval_tokens" in str(raised.value.hint)
    assert not (place / "s" / "trials" / "0001").exists()


@pytest.mark.long
def test_a_search_that_was_killed_goes_on(place: Path) -> None:
    section = space(RATE, trials=3, pruner="none")
    recipe = write(place, section)
    script = (
        "import sys; from pathlib import Path; from tunedock.search.trials import search\n"
        "from tunedock.launch.local import LocalLauncher\n"
        f"search([Path({str(recipe)!r})], folder=Path({str(place / 's')!r}), "
        f"launcher=LocalLauncher([sys.executable, {str(WORKER)!r}, '0.2']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=place) as process:
        events = place / "s" / "trials" / "0001" / "events.jsonl"
        deadline = time.monotonic() + 60
        while not (events.is_file() and '"step":1' in events.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
    run = Run.open(events.parent)
    while run.locked():  # the worker, in a session of its own, goes on to its end
        time.sleep(0.05)
    found = found_by(place, section, resume=True)
    assert [row.state for row in found.rows] == ["complete"] * 3
    assert len((place / "s" / "trials" / "0001" / "events.jsonl").read_text().splitlines()) >= 4


BAD: dict[str, tuple[str, str, str]] = {
    "an unknown key": (space("train.lernrate: {choice: [1, 2]}"), "search.space.train.lernrate", "learning_rate"),
    "no key at all": (space("lr: {choice: [1, 2]}"), "search.space.lr", "the recipe has no key `lr`"),
    "a value that cannot be": (space("adapter.r: {choice: [8, 0]}"), "search.space.adapter.r", "with `adapter.r: 0`"),
    "the end of a range": (space("adapter.dropout: {uniform: [0.0, 1.5]}"), "adapter.dropout", "with `adapter.dropout: 1.5`"),
    "a rule": (space("train.optim: {choice: [adamw_torch, galore_adamw]}"), "train.optim", "GaLore"),
    "its own directory": (space("train.output_dir: {choice: [a, b]}"), "train.output_dir", "a directory of its own"),
    "the validation rows": (space("data.split.seed: {choice: [1, 2]}"), "data.split.seed", "same validation rows"),
    "an endless grid": (space(RATE, sampler="grid"), "train.learning_rate", "endlessly many values"),
    "two forms": (space("adapter.r: {choice: [1, 2], int_uniform: [1, 2]}"), "search.space.adapter.r", "exactly one of"),
    "no form": (space("adapter.r: {}"), "search.space.adapter.r", "exactly one of"),
    "upside down": (space("adapter.r: {int_uniform: [8, 2]}"), "search.space.adapter.r", "the smaller first"),
    "logs of nothing": (space("train.weight_decay: {log_uniform: [0.0, 1.0]}"), "weight_decay", "above 0"),
    "one choice": (space("adapter.r: {choice: [8]}"), "search.space.adapter.r", "should be two values or more"),
    "no space": ("  trials: 3\n", "search.space", "missing"),
    "another metric": (space(RATE, metric="loss"), "search.metric", "loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(place: Path, name: str) -> None:
    section, where, said = BAD[name]
    with pytest.raises(RecipeError) as caught:
        found_by(place, section)
    assert where in str(caught.value) and said in str(caught.value), caught.value
    assert not (place / "s").exists()


def test_what_a_search_needs(place: Path) -> None:
    plain = place / "plain.yaml"
    plain.write_text("model: some/model\ndata: {train: ./rows.jsonl}\n")
    with pytest.raises(RecipeError, match="no `search` section"):
        search([plain], folder=place / "s")
    recipe = write(place, space(RATE), "launch: {nodes: 2, rendezvous: 'a:1'}\n")
    with pytest.raises(RecipeError, match="a search starts many runs, and a machine joins one"):
        search([recipe], folder=place / "s")
    recipe = write(place, space(RATE), "train: {eval_strategy: no}\n")
    with pytest.raises(RecipeError, match="there is no evaluation"):
        search([recipe], folder=place / "s")
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    with pytest.raises(RunError, match="in use"):
        found_by(place, space(RATE), "full")
    with pytest.raises(RunError, match="no search here"):
        found_by(place, space(RATE), "full", resume=True)


def test_another_recipe_does_not_go_on_with_a_search(place: Path) -> None:
    found_by(place, space(RATE, trials=1))
    with pytest.raises(RecipeError, match="not the space or settings"):
        found_by(place, space("adapter.r: {choice: [4, 8]}", trials=1), resume=True)
    recipe = write(place, space(RATE, trials=1), "train: {seed: 7}\n")
    with pytest.raises(RecipeError, match="not the recipe"):
        search([recipe], folder=place / "s", resume=True, launcher=quick())
    (place / "s" / "study.db").write_text("nothing of the kind")
    with pytest.raises(TunedockError, match="study cannot be opened"):
        found_by(place, space(RATE, trials=1), resume=True)


def test_train_takes_the_values_as_they_stand(place: Path) -> None:
    plain = resolve(load([write(place, space(RATE))]))
    without = place / "w.yaml"
    without.write_text("model: some/model\ndata: {train: ./rows.jsonl}\n")
    assert plain.hash == resolve(load([without])).hash
    assert plain.recipe.train.learning_rate == 1e-4


def test_the_page_shows_every_trial_and_no_markup_of_others() -> None:
    section = Search.model_validate(
        {"space": {"train.learning_rate": {"log_uniform": [1e-5, 1e-3]}, "data.system": {"choice": ["<b>a</b>", "b"]}}}
    )
    rows = [
        {"number": n, "state": state, "value": value, "step": 4, "run": "x", "why": None,
         "values": {"train.learning_rate": 10.0 ** -(3 + n), "data.system": "<b>a</b>"}}
        for n, (state, value) in enumerate([("complete", 1.0), ("pruned", 2.0), ("fail", None)])
    ]  # fmt: skip
    made = page({"metric": "eval_loss", "direction": "minimize", "best": rows[0], "trials": rows}, section)
    assert made.count("<polyline") == 2 and made.count("<tr") == 4
    assert "<b>" not in made and "&lt;b&gt;a" in made
    assert "<script" not in made and "http-equiv" in made and "default-src 'none'" in made


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    from tunedock.cli.app import main

    launchers: Callable[[], LocalLauncher] = quick
    monkeypatch.setattr("tunedock.search.trials.launcher_for", lambda _launch: launchers())
    write(place, space(RATE, trials=2))
    with pytest.raises(SystemExit) as ended:
        main(["search", "r.yaml", "--to", "s", *arguments])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    if arguments:
        assert [trial["state"] for trial in json.loads(out)["trials"]] == ["complete"] * 2
    else:
        assert "complete" in out and "s/best.yaml" in out and "s/index.html" in out


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_search_none_of_whose_trials_ended_well_has_failed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    from tunedock.cli.app import main

    monkeypatch.setattr("tunedock.search.trials.launcher_for", lambda _launch: quick())
    write(place, space("train.learning_rate: {choice: [0.5, 1.0]}", trials=2, sampler="grid"))
    with pytest.raises(SystemExit) as ended:
        main(["search", "r.yaml", "--to", "s", *arguments])
    out, error = capsys.readouterr()
    assert ended.value.code == 6
    told = json.loads(out)["error"]["message"] if arguments else error
    assert "none of the 2 trials came to its end; the first: the loss is nan at step 1" in told
