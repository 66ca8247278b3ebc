"""Own tasks are looked through before lm-eval sees them: what would run code is refused by file and line, and nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from own_tasks import TASKS, write_tasks
from tunedock.errors import RecipeError
from tunedock.eval.task_files import OwnTasks, look_through

PLAIN = "task: mine\ndataset_path: json\n"
LIBRARY = Path("/nowhere/lm_eval/tasks")


def look(folder: Path, *, run_code: bool = False, library: Path = LIBRARY) -> OwnTasks:
    return look_through(folder, library=library, metrics={"acc", "exact_match", "word_perplexity"}, run_code=run_code)


def one(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_tasks_groups_and_tags(tmp_path: Path) -> None:
    one(tmp_path, PLAIN + "tag: [sums, all]\n")
    one(tmp_path, "task: other\ndataset_path: some/hub-id\ntag: all\n", "other.yaml")
    one(tmp_path, "group: both\ntask: [mine, hellaswag]\n", "both.yaml")
    one(tmp_path / "__pycache__", "task: [\n")
    found = look(tmp_path)
    assert found == OwnTasks(frozenset({"mine", "other"}), frozenset({"both", "sums", "all"}), local=False)


def test_the_tasks_of_the_tests_are_plain(tmp_path: Path) -> None:
    metrics = {"acc", "acc_norm", "exact_match", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    found = look_through(write_tasks(tmp_path / "tasks"), library=LIBRARY, metrics=metrics, run_code=False)
    assert found == OwnTasks(frozenset(TASKS), frozenset(), local=True)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (PLAIN + "process_docs: !function utils.f\n", 3, "`!function utils.f` runs Python code"),
        ("class: !function utils.Task\ntask: mine\n", 1, "`!function utils.Task` runs Python code"),
        (PLAIN + "metric_list:\n  - metric: !function utils.f\n", 4, "runs Python code"),
        ("group: g\ntask:\n  - task: x\n    process_docs: !function a.b\n", 4, "runs Python code"),
        ("%TAG !x! !func\n---\n" + PLAIN + "process_docs: !x!tion os.system\n", 5, "runs Python code"),
        (PLAIN + "a: &a {b: !function c.d}\nc: *a\n", 3, "runs Python code"),
        (PLAIN + "metric_list:\n  - {metric: acc, hf_evaluate: true}\n", 4, "fetches a metric and runs it"),
        (PLAIN + "metric_list:\n  - metric: my/metric\n", 4, "no metric `my/metric`"),
        (PLAIN + "x: &x {metric: my/metric}\nmetric_list:\n  - *x\n", 3, "no metric `my/metric`"),
        ("task: mine\ndataset_path: pandas\n", 2, "reads pickles"),
        (PLAIN + "use_prompt: ../prompts.yaml:mine\n", 3, "can name Python objects"),
    ],
)
def test_code_is_refused_by_line_and_allowed_by_name(tmp_path: Path, text: str, line: int, said: str) -> None:
    one(tmp_path, text)
    (tmp_path / "utils.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(RecipeError, match=said) as caught:
        look(tmp_path)
    assert caught.value.where == f"{tmp_path / 'mine.yaml'}:{line}"
    assert "`eval.tasks_run_code: true` allows it" in (caught.value.hint or "")
    look(tmp_path, run_code=True)  # parsed, still not run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN + "x: !!python/object/apply:os.system [ls]\n", "means nothing in a task"),
        (PLAIN + "x: !unknown 1\n", "means nothing in a task"),
        ("task: [\n  b: {", "this is no YAML"),
        ("task: a\n---\ntask: b\n", "this is no YAML"),
        ("- task\n", "keys and values"),
        ("", "keys and values"),
        (PLAIN + "include: [{a: 1}]\n", "`include` is no file name"),
        (PLAIN + "include: nothing.yaml\n", "nothing.yaml cannot be read: No such file"),
        (PLAIN + "include: mine.yaml\n", "included a second time"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("[" * 400_000, "nested too deeply"),  # the C parser's own stack ends at some ten thousand
        # Ways to an `include`, a metric or a data set that is written nowhere as one.
        (PLAIN + "<<: {<<: {include: code}}\n", "a task takes no `<<`"),
        (PLAIN + "<<: [{include: code}, {include: plain}]\n", "a task takes no `<<`"),
        (PLAIN + "!!merge x: {include: code}\n", "a task takes no `<<`"),
        (PLAIN + "? !!str {=: include}\n: code\n", "a bare `=`"),
        ("task: mine\ndataset_path: !!str {=: pandas}\n", "a bare `=`"),
        (PLAIN + "target_delimiter: =\n", "a bare `=`"),
        ("dataset_path: json\n", "no task is defined there"),
    ],
)
def test_what_is_no_task(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        look(one(tmp_path, text), run_code=True)
    assert str(tmp_path) in (caught.value.where or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        look(tmp_path / "nothing")


def test_what_a_file_includes_is_looked_through(tmp_path: Path) -> None:
    folder = one(tmp_path / "tasks", PLAIN + "include: _more\n")
    (folder / "_more").write_text("include: deep/_most\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "_most").write_text("doc_to_text: !function utils.f\n")
    with pytest.raises(RecipeError, match="runs Python code") as caught:
        look(folder)
    assert (caught.value.where or "").endswith("deep/_most:1")


def test_an_include_or_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text("output_type: multiple_choice\n")
    folder = one(tmp_path / "tasks", PLAIN + "include: ../outside.yaml\n")
    with pytest.raises(RecipeError, match="leads out of the folder"):
        look(folder)
    (folder / "mine.yaml").write_text(PLAIN)
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(RecipeError, match="leads out of the folder"):
        look(folder)


def test_lm_evals_own_files_may_be_included(tmp_path: Path) -> None:
    library = tmp_path / "library"
    one(library, "process_docs: !function utils.f\n", "_template")
    folder = one(tmp_path / "tasks", f"task: mine\ninclude: {library / '_template'}\n")
    assert look(folder, library=library).tasks == {"mine"}


@given(
    st.dictionaries(
        st.sampled_from(
            ["task", "group", "tag", "include", "dataset_path", "metric_list", "metric", "hf_evaluate", "<<"]
        ),
        st.one_of(st.text("ab!&*{}[]:#-' \n\"%<>|", max_size=12), st.lists(st.text("ab", max_size=2), max_size=3)),
    ),
    st.text("!&*<{[-: \n%|>'ab", max_size=20),
)
def test_whatever_stands_in_a_file_it_is_looked_through_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], rest: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    text = "".join(f"{key}: {value}\n" for key, value in values.items()) + rest
    one(folder, text)
    try:
        look(folder)
    except RecipeError as error:
        assert error.where
